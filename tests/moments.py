"""Children that die at given moments: what `killed_runs.py`, `killed_saves.py` and `killed_distill.py` share."""

import os
import random
import shutil
import signal

from llmkern import weight_writer


class Moments:
    """Counts, and dies at number `last`."""

    def __init__(self, last):
        self.count, self.last = 0, last

    def pass_by(self):
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function):
        def wrapped(*args, **kwargs):
            self.pass_by()
            result = function(*args, **kwargs)
            self.pass_by()
            return result

        return wrapped

    def within_tensors(self):
        """From now on a moment half-way through every write of a tensor, too."""
        write = weight_writer._write

        def in_halves(put, data):
            write(put, data[: len(data) // 2])
            self.pass_by()
            write(put, data[len(data) // 2 :])

        weight_writer._write = in_halves


def forked(work):
    """Run `work` in a child; (the signal that ended it or 0, what it returned)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with os.fdopen(writer, "w") as pipe:
            pipe.write(str(work()))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def killed_and_resumed(run, result, parts_of, root, *, kills, seed):
    """Kill `run(folder, last)` at random moments and run it again there: what differs from a run that was left alone.

    `run` returns how many moments it had, `result(folder)` what it made, `parts_of(folder)` what a killed one had done.
    """
    for name in ("warm", "whole"):
        (root / name).mkdir(parents=True)
    run(root / "warm")  # imports whatever is imported late, once for all children
    code, said = forked(lambda: run(root / "whole"))
    assert code == 0
    whole, moments = result(root / "whole"), int(said)
    different, parts = [], []
    for last in random.Random(seed).sample(range(1, moments + 1), kills):
        folder = root / f"killed{last}"
        folder.mkdir()
        code, _ = forked(lambda: run(folder, last))  # noqa: B023
        assert code == -signal.SIGKILL, (last, code)
        parts.append(parts_of(folder))
        code, _ = forked(lambda: run(folder))  # noqa: B023
        if code or result(folder) != whole:
            different.append(last)
        shutil.rmtree(folder)
    return {"moments": moments, "parts": parts, "different": different}
