"""Somebody's Python code beside its tests: in processes of their own, within walls, and judged by one that never runs
it.

Who talks to whom: ``run`` starts ``supervisor``, which holds the limits. That starts the judge, which runs the tests;
and the judge starts ``program``, which runs the code and answers what the judge asks over ``exchange``. ``walls``
part them from the machine, ``system_calls`` from what of the kernel they need not have.
"""
