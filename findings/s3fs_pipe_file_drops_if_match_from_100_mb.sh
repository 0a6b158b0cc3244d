#!/usr/bin/env bash
# s3fs 2026.9.0: `pipe_file(path, data, IfMatch=tag)` keeps its condition below 100 MB and drops it from there on.
#
# Below twice its chunk of 50 MiB s3fs sends one put_object with the condition. From there on it sends parts: then the
# condition goes to create_multipart_upload, which knows none, and not to complete_multipart_upload, where S3 would heed
# it. The write that should have been refused replaces what another writer has put meanwhile, and nothing is said.
# (mode="create" sends If-None-Match in both ways.) A put_object of one's own keeps the condition up to 5 GB, and the
# same holds for a completion of one's own. Seen with aiobotocore 3.10.0, against moto 5.2.5:
#
#   100 bytes, stale tag: refused, the object is the other writer's
#   104,857,600 bytes, stale tag: written, the object is ours
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet s3fs==2026.9.0 fsspec==2026.9.0 aiobotocore==3.10.0 boto3==1.43.117 \
  botocore==1.43.117 'moto[s3,server]==5.2.5' flask==3.1.3
cat > "$folder/swap.py" <<'PY'
import sys

import s3fs
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
host, port = server.get_host_and_port()
store = s3fs.S3FileSystem(key="a", secret="b", endpoint_url=f"http://{host}:{port}", use_listings_cache=False)
store.mkdir("bucket")
replaced = []
for size in (100, 100 * 2**20):
    store.pipe_file("bucket/state", b"first")
    stale = store.info("bucket/state")["ETag"]
    store.pipe_file("bucket/state", b"of another writer")
    try:
        store.pipe_file("bucket/state", bytes(size), IfMatch=stale)
        said = "written"
    except OSError:
        said = "refused"
    replaced.append(store.cat_file("bucket/state", start=0, end=17) != b"of another writer")
    print(f"{size:,} bytes, stale tag: {said}, the object is {'ours' if replaced[-1] else 'the other writer' + chr(39) + 's'}")
server.stop()
if replaced != [False, True]:
    sys.exit("It behaves otherwise now: the finding is out of date.")
PY
"$folder/venv/bin/python" "$folder/swap.py"
