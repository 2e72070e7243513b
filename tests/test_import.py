"""What importing costs and what it must not drag in."""

import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n"))


def test_import_llmkern_does_not_import_transformers():
    loaded = modules_after("import llmkern")
    assert "torch" in loaded
    assert not loaded & {"transformers", "accelerate", "datasets", "compressed_tensors", "gguf"}


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_version_and_help_do_not_import_torch(option):
    loaded = modules_after(
        "import llmkern_cli\n"
        "try:\n"
        f"    llmkern_cli.main(['{option}'])\n"
        "except SystemExit as end:\n"
        "    assert not end.code"
    )
    assert "llmkern_cli" in loaded
    assert not loaded & {"torch", "numpy", "llmkern"}


def test_help_of_every_command_does_not_import_torch():
    loaded = modules_after(
        "import llmkern_cli\n"
        "for module in llmkern_cli.COMMANDS:\n"
        "    try:\n"
        "        llmkern_cli.main([module.NAME, '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert not end.code"
    )
    assert not loaded & {"torch", "numpy", "llmkern"}


def test_lazy_names_are_all_public():
    import llmkern

    assert set(llmkern._LAZY) <= set(llmkern.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = llmkern.nonsense
