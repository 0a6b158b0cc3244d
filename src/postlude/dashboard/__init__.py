"""The live page of runs (``postlude dashboard``) and the same as one file (``postlude report``).

- ``server.py`` serves it; ``access.py`` stands before it; ``followed.py`` reads runs, once for all tabs.
- ``charts.py`` makes of curves what ECharts draws; ``views/`` has one file a view, ``frame.py`` what they share.

NiceGUI is imported here alone, and only by ``server.py``, ``frame.py`` and the views: the rest is tested without it.
"""
