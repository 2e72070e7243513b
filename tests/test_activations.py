"""Hidden states beyond a budget are in a file, and nothing else changes; large matrices are mapped, likewise."""

import errno
import os

import pytest
import tiny
import torch

import llmkern
from llmkern import _large, _memory, activations
from llmkern.activations import Store
from llmkern.solvers import Hessian, gptq, sparsegpt


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where temporary files go; empty again at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert not list(folder.glob("llmkern-*"))


def same(one, other):
    assert one.shape == other.shape
    assert one.stride() == other.stride()
    assert one.dtype == other.dtype
    assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [0, 3000, 1 << 20])
def test_what_is_put_comes_back(budget, dtype, generator):
    tensors = [torch.randn(2, 5, 7 + at, generator=generator).to(dtype) for at in range(12)]
    tensors += [torch.randn(6, 4, generator=generator).T, torch.randn(1, 3).expand(4, 3), torch.randn(9)[2:5]]
    tensors[3][0, 0, 0] = float("nan")
    with Store(budget) as store:
        for _ in range(2):
            for at, tensor in enumerate(tensors):
                store.put(at, tensor)
        tensors[5] = torch.randn(40, 40, generator=generator)  # no longer fits in its place
        store.put(5, tensors[5])
        store.put(4, None)
        for at, tensor in enumerate(tensors):
            got = store.get(at)
            if at == 4:
                assert got is None
            else:
                same(got, tensor.clone())
        assert store.get(99) is None
        assert (store.spilled == 0) == (budget == 1 << 20)
        assert sum(tensor.nbytes for tensor in store._held.values()) <= budget
    assert store.get(0) is None


def test_a_place_in_the_file_is_used_again():
    with Store(0) as store:
        for round_ in range(5):
            for at in range(3):
                store.put(at, torch.full((100,), float(round_ * at)))
        assert os.fstat(store._file.fileno()).st_size == 3 * 400
        assert float(store.get(2)[0]) == 8


def test_a_part_of_a_large_tensor_does_not_keep_it():
    with Store(1 << 30) as store:
        store.put(0, torch.zeros(1000, 10)[:3])
        assert store.get(0).untyped_storage().nbytes() == 120


@pytest.mark.parametrize("budget", [-1, 1.5, True])
def test_a_budget_is_bytes(budget):
    with pytest.raises(ValueError, match="activation_budget must be None or bytes >= 0"):
        llmkern.compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), activation_budget=budget, progress=False)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5"])
def test_the_result_is_the_same(kind, monkeypatch):
    stores = []
    monkeypatch.setattr(activations.Store, "close", lambda self: stores.append(self), raising=True)
    calibration = [tiny.inputs(kind, part) for part in tiny.token_ids(11).split(4)]
    models = []
    for budget in (None, 60_000, 0):
        models.append(tiny.MODELS[kind]())
        llmkern.compress(models[-1], "gptq-int4-g32", calibration, progress=False, activation_budget=budget)
    # The compressed and the dense model's hidden states have half of it each.
    counts = [sum(store.spilled for store in stores if store.budget == budget) for budget in (30_000, 0)]
    assert 0 < counts[0] < counts[1]
    assert all(not store.spilled for store in stores if store.budget not in (0, 30_000))
    for other in models[1:]:
        for (name, one), two in zip(models[0].state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(one, two), name


def test_one_set_is_in_memory(monkeypatch):
    """Outputs take the place of inputs: never more tensors than batches."""
    most, put = [0], Store.put

    def counted(self, at, tensor):
        put(self, at, tensor)
        most[0] = max(most[0], len(self._held))

    monkeypatch.setattr(Store, "put", counted)
    llmkern.compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(20).split(2), progress=False)
    assert most[0] == 10


def test_a_full_disk_is_an_error_in_one_line(monkeypatch, temporary):
    class Full:
        def seek(self, offset):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            pass

    monkeypatch.setattr(activations.tempfile, "TemporaryFile", lambda **kwargs: Full())
    with pytest.raises(OSError, match=r"bytes of activations do not fit in .*temporary: No space left") as caught:
        llmkern.compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), activation_budget=0, progress=False)
    assert caught.value.errno == errno.ENOSPC


def test_an_error_leaves_no_file(temporary):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="20 of 21 layers"):
        llmkern.compress(model, "gptq-int4-g32", tiny.token_ids(), activation_budget=0, progress=False)
    assert not list(temporary.glob("llmkern-*"))


def test_what_is_available(tmp_path, monkeypatch):
    assert _memory.available() > 1 << 20
    own = tmp_path / "cgroup" / "a" / "b"
    own.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:  8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/other\n0::/a/b\n")
    (own / "memory.max").write_text("max\n")
    (own / "memory.current").write_text("500\n")
    monkeypatch.setattr(_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(_memory, "CGROUPS", tmp_path / "cgroup")
    assert _memory.available() == 8000 * 1024
    (own.parent / "memory.max").write_text("5000\n")
    (own.parent / "memory.current").write_text("4000\n")
    (own.parent / "memory.stat").write_text("anon 1\ninactive_file 700\n")
    assert _memory.available() == 1700


def map_all(monkeypatch):
    """Every matrix of [K, K] is mapped from now on; the sizes of those that were."""
    made, reserve = [], os.posix_fallocate

    def counted(handle, start, size):
        made.append(size)
        reserve(handle, start, size)

    monkeypatch.setattr(_large, "SMALL", 0)
    monkeypatch.setattr(_large._memory, "available", lambda *device: 0)
    monkeypatch.setattr(os, "posix_fallocate", counted)
    return made


@pytest.mark.parametrize("solve", [gptq, sparsegpt])
def test_a_mapped_matrix_is_like_any_other(solve, monkeypatch, generator):
    w, x = torch.randn(8, 300, generator=generator), torch.randn(400, 300, generator=generator)
    wanted = solve(w, Hessian(300).add(x), bits=4, group_size=50)
    made = map_all(monkeypatch)
    got = solve(w, Hessian(300).add(x), bits=4, group_size=50)
    assert len(made) >= 2  # the sum, and its factor
    assert set(made) == {4 * 300 * 300}
    assert torch.equal(got.weight, wanted.weight)
    assert got.loss == wanted.loss


def test_a_disk_too_small_for_a_matrix(monkeypatch):
    map_all(monkeypatch)

    def full(handle, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"a matrix of 40000 bytes \(K=100\) does not fit in .*: No space left"):
        Hessian(100)
