"""Raw operators, as `torch.ops.dhcl` has them, where sizes are zero and lists name what is not.

A tensor without elements has no address, so reading from one ends the process. All calls run in a
process of their own, which says what comes next before it calls.
"""

import itertools
import subprocess
import sys

import pytest
import torch

from dhcl_ops import _library, _ops

CPU = torch.device("cpu")
NOT_COMPILED = "no op is compiled here"

# Samples that have what an op's own one leaves out: rows are listed here, and not classes.
MORE = {"update_segment_mean_": lambda sample: (*sample, torch.tensor([1, 3, 1, 0, 0, 2]))}


def cut(tensor, places):
    """The same kind of tensor with no elements along these dimensions."""
    return tensor.new_empty([0 if d in places else n for d, n in enumerate(tensor.shape)])


def cases(op, arguments):
    """The op's arguments, of which some are empty; and what was changed."""
    names = [each.name for each in op.overload._schema.arguments]
    tensors = [i for i, value in enumerate(arguments) if torch.is_tensor(value)]

    def changed(what, new):
        made = [new.get(i, value) for i, value in enumerate(arguments)]
        return what, [value.clone() if torch.is_tensor(value) else value for value in made]

    for i in tensors:
        for d in range(arguments[i].dim()):
            yield changed(f"dimension {d} of {names[i]}", {i: cut(arguments[i], {d})})
        if "offsets" in names[i]:
            yield changed(f"no lists in {names[i]}", {i: torch.zeros_like(arguments[i][:1])})
    for i, j in itertools.combinations(tensors, 2):
        if arguments[i].dim() and arguments[j].dim():
            both = {i: cut(arguments[i], {0}), j: cut(arguments[j], {0})}
            yield changed(f"rows of {names[i]} and {names[j]}", both)
    sizes = sorted({size for i in tensors for size in arguments[i].shape})
    for chosen in itertools.chain(
        itertools.combinations(sizes, 1), itertools.combinations(sizes, 2)
    ):
        places = {i: {d for d, n in enumerate(arguments[i].shape) if n in chosen} for i in tensors}
        yield changed(f"all sizes {chosen}", {i: cut(arguments[i], places[i]) for i in tensors})
    yield changed("everything", {i: cut(arguments[i], set(range(9))) for i in tensors})


def results(function, arguments):
    """What a call returns and changes, or None and the first line of its error."""
    arguments = [value.clone() if torch.is_tensor(value) else value for value in arguments]
    try:
        returned = function(*arguments)
    except (RuntimeError, IndexError, ValueError) as error:
        return None, str(error).splitlines()[0]
    returned = returned if isinstance(returned, (tuple, list)) else [returned]
    return [value for value in (*returned, *arguments) if torch.is_tensor(value)], ""


def check(op, what, arguments):
    found, error = results(op.overload, arguments)
    expected, _ = results(op.reference, arguments)
    if found is None:
        assert op.name in error or "debiased_contrastive_loss" in error, (op.name, what, error)
    elif expected is not None:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True, msg=f"{op.name}: {what}")


def main():
    torch.set_num_threads(1)
    if not (_library.load_once() and any(op.compiled("cpu") for op in _ops.OPS.values())):
        print(NOT_COMPILED)
        return
    count = 0
    for op in _ops.OPS.values():
        if op.compiled("cpu"):
            samples = [op.sample(CPU)]
            samples += [MORE[op.name](samples[0])] if op.name in MORE else []
            for what, arguments in itertools.chain(*(cases(op, sample) for sample in samples)):
                print(f"{op.name}: {what}", flush=True)
                check(op, what, arguments)
                count += 1
    print(f"{count} calls")


def test_no_raw_operator_reads_what_is_not_there():
    done = subprocess.run(
        [sys.executable, "-m", __name__], capture_output=True, text=True, check=False
    )
    said = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{said}, status {done.returncode}: {done.stderr[-2000:]}"
    if said[0] == NOT_COMPILED:
        pytest.skip(said[0])
    assert int(said[0].split()[0]) > 300


if __name__ == "__main__":
    main()
