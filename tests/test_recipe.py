import pytest
import torch

from llmkern.recipe import Recipe

CONTRACT = (
    "bf16", "fp16", "rtn-int8", "rtn-int4-g128", "gptq-int8", "gptq-int4-g128", "gptq-int4", "gptq-int3-g64",
    "magnitude-0.5", "magnitude-2:4", "wanda-0.5", "wanda-2:4", "sparsegpt-0.5", "sparsegpt-2:4",
    "sparsegpt-2:4-int4-g128", "w8a8",
)  # fmt: skip
MORE = ("gptq-int4-g128-asym", "rtn-int4-g32-a8", "sparsegpt-4:8", "wanda-2:4-int4-g64", "sparsegpt-0.5-int8", "pack")
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize("short", CONTRACT + MORE)
def test_short_forms_survive_the_round_trip(short):
    recipe = Recipe.parse(short)
    assert str(recipe) == short
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_short_forms_mean_what_they_say():
    joint = Recipe.parse("sparsegpt-2:4-int4-g128")
    assert (joint.method, joint.sparsity, joint.bits, joint.group_size) == ("sparsegpt", "2:4", 4, 128)
    assert Recipe.parse("gptq-int4").group_size is None
    assert Recipe.parse("w8a8") == Recipe("rtn", bits=8, activations="int8")
    assert Recipe.parse("gptq-w8a8") == Recipe("gptq", bits=8, activations="int8")
    assert Recipe.parse("bf16") == Recipe("cast", dtype=torch.bfloat16)
    assert Recipe.parse("magnitude-0.5").sparsity == 0.5


@pytest.mark.parametrize(
    ("short", "text"),
    [
        ("gptq", "gptq needs bits"),
        ("gptq-int5", "bits must be None or one of"),
        ("rtn-int4-g0", "group_size must be"),
        ("sparsegpt", "needs a sparsity"),
        ("sparsegpt-4:2", "sparsity must be"),
        ("gptq-int4-int8", "sets bits twice"),
        ("gptq-int4-fast", "unknown short form"),
        ("awq-int4", "method must be one of|unknown short form"),
        ("", "unknown short form"),
        ("rtn-2:4-int4", "does not prune"),
        ("sparsegpt-2:4-int4-asym", "sparse weights are symmetric"),
        ("sparsegpt-2:4-a8", "int8 activations"),
        ("pack-int4", "unknown short form|does not quantize"),
    ],
)
def test_bad_short_forms_are_refused(short, text):
    with pytest.raises(ValueError, match=text) as error:
        Recipe.parse(short)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -1}, "group_size"),
        ({"damp": 1.5}, "damp"),
        ({"clip": "max"}, "clip"),
        ({"activations": "int4"}, "activations"),
        ({"scale_dtype": "float8"}, "scale_dtype"),
        ({"targets": ["re:("]}, "bad pattern"),
        ({"targets": ["re:" + "a" * 300]}, "characters"),
        ({"overrides": {"q_proj": {"bit": 8}}}, "did you mean 'bits'"),
        ({"overrides": {"q_proj": 8}}, "override 'q_proj' must be"),
    ],
)
def test_bad_fields_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        Recipe(**{"method": "gptq", "bits": 4, **fields})


def test_patterns_match_names_suffixes_and_expressions():
    def layers(**fields):
        return set(Recipe.parse("rtn-int8", **fields).assign(NAMES)[0])

    assert layers() == set(NAMES[:3])
    assert layers(ignore=()) == set(NAMES)
    assert layers(targets=["down_proj"]) == set(NAMES[1:3])
    assert layers(targets="mlp.down_proj") == set(NAMES[1:3])
    assert layers(targets=[NAMES[0]]) == {NAMES[0]}
    assert layers(targets=["re:.*layers\\.1\\."]) == {NAMES[2]}
    assert layers(ignore=["re:.*layers\\.0\\."]) == {NAMES[2], NAMES[3]}


def test_every_layer_that_is_left_has_a_reason():
    chosen, skipped = Recipe.parse("rtn-int8", targets=["down_proj"]).assign(NAMES)
    assert set(chosen) | set(skipped) == set(NAMES)
    assert skipped["lm_head"] == "ignored by 'lm_head'"
    assert skipped[NAMES[0]] == "not among the targets"


def test_the_output_head_is_ignored_under_any_name():
    names = [*NAMES[:3], "embed_out"]
    assert "embed_out" not in Recipe.parse("rtn-int8").assign(names, head="embed_out")[0]
    assert "embed_out" in Recipe.parse("rtn-int8").assign(names, head=None)[0]


def test_overrides_change_single_layers():
    recipe = Recipe.parse(
        "gptq-int4-g64",
        overrides={"q_proj": {"bits": 8, "group_size": None}, "layers.0.mlp.down_proj": "rtn-int8",
                   "layers.1.mlp.down_proj": None},
    )  # fmt: skip
    chosen, skipped = recipe.assign(NAMES)
    assert str(chosen[NAMES[0]]) == "gptq-int8"
    assert str(chosen[NAMES[1]]) == "rtn-int8"
    assert "override" in skipped[NAMES[2]]
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_overrides_count_for_what_needs_calibration():
    assert not Recipe.parse("rtn-int8").needs_calibration
    assert Recipe.parse("gptq-int8").needs_calibration
    assert Recipe.parse("rtn-int8", overrides={"q_proj": "gptq-int4"}).needs_calibration


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"targets": ["down_prj"]}, "targets 'down_prj' matches no linear layer; did you mean 'down_proj'"),
        ({"ignore": ["head"]}, "ignore 'head' matches no linear layer"),
        ({"overrides": {"gate_proj": {"bits": 8}}}, "overrides 'gate_proj' matches no linear layer"),
        ({"targets": ["lm_head"]}, "is ignored; pass ignore="),
        ({"overrides": {"down_proj": "rtn-int8", "mlp.down_proj": "rtn-int8"}}, "both match"),
    ],
)
def test_patterns_that_do_nothing_are_errors(fields, text):
    with pytest.raises(ValueError, match=text):
        Recipe.parse("rtn-int8", **fields).assign(NAMES)


def test_load_reads_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "recipe: gptq-int4-g64\ndamp: 0.05\nignore: [lm_head, q_proj]\noverrides:\n  down_proj: {bits: 8}\n"
    )
    recipe = Recipe.load(path)
    assert recipe == Recipe(
        "gptq", bits=4, group_size=64, damp=0.05, ignore=("lm_head", "q_proj"), overrides={"down_proj": {"bits": 8}}
    )


def test_a_bare_pattern_in_yaml_is_no_number(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: sparsegpt\nsparsity: 2:4\noverrides:\n  down_proj: {sparsity: 4:8}\n")
    recipe = Recipe.load(path)
    assert recipe.sparsity == "2:4"
    assert recipe.overrides[0][1]["sparsity"] == "4:8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: gptq\nbits: 4\ngroupsize: 64\n", "unknown key 'groupsize'; did you mean 'group_size'"),
        ("bits: 4\n", "wanted a method"),
        ("- gptq\n", "wanted a mapping"),
        ("method: [gptq\n", "not YAML"),
        ("recipe: gptq-int4\ntargets: 5\n", "targets must be a pattern or a list of patterns, got 5"),
        ("recipe: gptq-int4\noverrides: 5\n", "overrides must be a mapping of patterns to changes, got 5"),
        ("recipe: gptq-int4\noverrides: [q_proj, k]\n", "overrides must be a mapping of patterns"),
        ("method: !!python/object/apply:os.getcwd []\n", "not YAML"),
    ],
)
def test_load_refuses_what_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Recipe.load(path)
    assert "\n" not in str(error.value)


def test_load_names_the_file_it_cannot_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^recipe .*none\.yaml: no such file$"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"^recipe .*binary\.yaml: not UTF-8 text"):
        Recipe.load(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["descent", "scale_refit"])
def test_what_follows_the_columns_needs_codes(name):
    for fine in ("gptq-int4", "wanda-2:4-int4", "sparsegpt-2:4-int4-g64"):
        assert getattr(Recipe.parse(fine, **{name: 3}), name) == 3
    for recipe, fields in (("rtn-int4", {}), ("sparsegpt-2:4", {}), ("sparsegpt-2:4-int4", {"refit": False})):
        with pytest.raises(ValueError, match=f"recipe: {name} is for the codes of gptq, wanda, or sparsegpt"):
            Recipe.parse(recipe, **{name: 3}, **fields)
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"{name} must be None or an int >= 0, got {value}"):
            Recipe.parse("gptq-int4", **{name: value})
