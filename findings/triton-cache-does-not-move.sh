#!/usr/bin/env bash
# Triton 3.7.1 (3.6.0 and 3.9.0 too): a cache that was compiled on one machine, or under another path, is of no use
# where it is copied to, though its keys (a hash of source, target, options and versions) are the same there. Beside
# each kernel lies a __grp__ file of the group's members, by absolute path. After the move the key's folder is found and
# read, the members' old paths are handed on, and as they are no longer there everything compiles again, in silence; the
# group is then written anew. What ships compiled kernels (an image, a CI cache, a machine that is rented by the
# minute) has to keep the path the same, or to rewrite these files.
# Seen: compiled once, then with the folder where it was: nothing new. Moved: every stage compiles again. Moved with the
# paths rewritten: nothing compiles (for sm_90; no GPU is needed).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --no-deps triton==3.7.1
cat >"$folder/compile.py" <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def copy(source, target):
    i = tl.arange(0, 128)
    tl.store(target + i, tl.load(source + i))


def stages(src, metadata, metadata_group, times, cache_hit):
    print("hit" if cache_hit else "compiled")


triton.knobs.compilation.listener = stages
types = {"source": "*fp32", "target": "*fp32"}
triton.compile(ASTSource(copy, types, {}), target=GPUTarget("cuda", 90, 32))
PYTHON
compile() { TRITON_CACHE_DIR="$1" "$folder/env/bin/python" "$folder/compile.py"; }
seen=$(compile "$folder/here"; compile "$folder/here")
mv "$folder/here" "$folder/there"
seen+=" $(compile "$folder/there")"
mv "$folder/there" "$folder/rewritten"
find "$folder/rewritten" -name '__grp__*' -exec sed -i "s#$folder/there#$folder/rewritten#g" {} +
seen+=" $(compile "$folder/rewritten")"
echo "first, again, moved, moved with its paths rewritten:" $seen
test "$(echo $seen)" = "compiled hit compiled hit"
