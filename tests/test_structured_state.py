"""Plans and restorations with a state folder: killed, resumed, and refused."""

import pytest
import tiny
from scripts import said_by

from llmkern.prune import apply_structured, plan_structured
from llmkern.state import State

pytest.importorskip("transformers")
IDS = tiny.token_ids(6)


def test_killed_runs_end_with_the_same_bits(tmp_path):
    said = said_by("killed_structured.py", tmp_path)
    assert said["different"] == []
    assert any(0 < plan < 4 for plan, _ in said["parts"])
    assert any(apply for _, apply in said["parts"])


def test_a_finished_state_gives_the_same_again_without_work(tmp_path, monkeypatch):
    model = tiny.llama()
    first = plan_structured(model, IDS, kv_groups=1, state_dir=tmp_path / "s", progress=False)
    monkeypatch.setattr("llmkern.prune.walk.run", None)
    assert plan_structured(model, IDS, kv_groups=1, state_dir=tmp_path / "s", progress=False) == first


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"ids": tiny.token_ids(7)}, "calibration"), ({"method": "wanda"}, "plan.method is \"obs\" there"),
        ({"mlp": 0.25}, "plan.mlp is 0.5 there and 0.25 here"), ({"seed": 3}, "model.values"),
    ],
)  # fmt: skip
def test_the_plan_of_another_run(tmp_path, change, part):
    asked = {"mlp": 0.5, "multiple_of": 8, "state_dir": tmp_path / "s", "progress": False}
    plan_structured(tiny.llama(), IDS, **asked)
    ids = change.pop("ids", IDS)
    model = tiny.llama()
    if change.pop("seed", None):
        model.lm_head.weight.data[0] += 1
    with pytest.raises(ValueError, match=f"plan_structured: state_dir .*: of another run: .*{part}"):
        plan_structured(model, ids, **{**asked, **change})


def test_the_restoration_of_another_run(tmp_path):
    model = tiny.llama()
    plan = plan_structured(model, IDS, kv_groups=1, progress=False)
    asked = {"calibration": IDS, "state_dir": tmp_path / "s", "progress": False}
    apply_structured(model, plan, **asked)
    other = plan_structured(model, IDS, kv_groups=1, method="magnitude", progress=False)
    with pytest.raises(ValueError, match=r"apply_structured: state_dir .*: of another run: plan is"):
        apply_structured(model, other, **asked)
    with pytest.raises(ValueError, match=r"damp is 0.1 there and 0.2 here"):
        apply_structured(model, plan, **asked, damp=0.2)


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path, monkeypatch):
    def stop(self, part, tensors):
        raise KeyboardInterrupt

    monkeypatch.setattr(State, "write_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        plan_structured(tiny.llama(), IDS, kv_groups=1, state_dir=tmp_path / "s", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, monkeypatch):
    """What was finished before stays, and the run goes on from there."""
    model, write = tiny.llama(), State.write_tensors

    def full(self, part, tensors):
        if self.parts:
            monkeypatch.setattr("llmkern.weight_writer._write", no_room)
        write(self, part, tensors)

    def no_room(put, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(State, "write_tensors", full)
        with pytest.raises(OSError, match=r"plan_structured: state_dir .*No space left on device; 1 parts before it"):
            plan_structured(model, IDS, kv_groups=1, state_dir=tmp_path / "s", progress=False)
    monkeypatch.undo()
    found = plan_structured(model, IDS, kv_groups=1, state_dir=tmp_path / "s", progress=False)
    assert found == plan_structured(model, IDS, kv_groups=1, progress=False)
