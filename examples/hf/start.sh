# SPDX-License-Identifier: Apache-2.0
# Sourced by run.sh and run_sft.sh: checks once what both need, before one process per device is started.
# Sets: here, model, output, files, start.

stop() {
    echo "error: $1" >&2
    exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
[[ $# -ge 3 ]] || stop "$(basename "$0") takes a latent export, a directory for the result, and one or more files"
[[ ${DEVICES:=8} =~ ^[1-9][0-9]{0,3}$ ]] || stop "the environment variable DEVICES holds '$DEVICES': expected a whole number from 1"
command -v "$python" > /dev/null || stop "there is no $python: activate an environment, or name one in PYTHON"
for package in torch transformers deepspeed; do
    # The package is searched but not imported, since importing takes seconds.
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$package') is None)" ||
        stop "$python has no $package: pip install 'bitcpm_megatron[hf]' deepspeed; train.py and train_sft.py run without DeepSpeed"
done
model=$1 output=$2 files=("${@:3}")
start=("$python" -m torch.distributed.run --nproc_per_node "$DEVICES")
