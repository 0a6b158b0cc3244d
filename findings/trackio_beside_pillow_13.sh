#!/usr/bin/env bash
# trackio 0.43.0: beside Pillow 13 a resolver takes one of its first releases, with the whole of Gradio, and says
# nothing of it.
#
# Since its rewrite trackio asks for pillow<13; its first releases name no Pillow at all. So an environment that has
# Pillow 13 gets one of those, whose storage and calls are others, as "trackio" without a bound. pip needs minutes of
# going back through versions for the same answer. A lower bound (trackio>=0.43) turns it into a conflict that is told;
# Pillow 12.3 beside it works. Seen with uv 0.13.9, Python 3.11:
#
#   trackio and pillow==13.0.0          trackio==0.0.6, gradio
#   trackio>=0.43.0 and pillow==13.0.0  no solution
#   trackio and pillow==12.3.0          trackio==0.43.0, no gradio but gradio-client
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv==0.13.9
resolve() {
  printf '%s\n' "$@" > "$folder/wanted.in"
  "$folder/venv/bin/uv" pip compile --quiet --no-annotate --no-header "$folder/wanted.in"
}
beside_13=$(resolve 'trackio<=0.43.0' pillow==13.0.0)
beside_12=$(resolve 'trackio<=0.43.0' pillow==12.3.0)
echo "beside Pillow 13.0.0: $(grep -E '^(trackio|gradio)==' <<< "$beside_13" | xargs)"
echo "beside Pillow 12.3.0: $(grep -E '^(trackio|gradio)==' <<< "$beside_12" | xargs)"
grep -q '^trackio==0\.0\.' <<< "$beside_13" && grep -q '^gradio==' <<< "$beside_13" || { echo "It takes another now."; exit 1; }
grep -q '^trackio==0\.43\.0$' <<< "$beside_12" && ! grep -q '^gradio==' <<< "$beside_12" || { echo "It takes another now."; exit 1; }
if resolve 'trackio>=0.43.0,<=0.43.0' pillow==13.0.0 2> "$folder/why"; then echo "They go together now."; exit 1; fi
echo "With a lower bound: no solution, which is told."
