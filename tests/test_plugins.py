"""Names to objects: is the right thing made, is nothing else imported, and does every mistake name itself?"""

import importlib
import subprocess
import sys
import textwrap

import pytest

from realtime_mpe import plugins
from realtime_mpe.errors import UserError
from realtime_mpe.source import FileSource


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on sys.path; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0].startswith("fake_"):
            del sys.modules[name]


def write_module(folder, name, text):
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    importlib.invalidate_caches()


def write_dist(folder, name, entries):
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(entries)


MIC = """
    class Mic:
        class Inner:
            pass
        def __init__(self, where, *, gain=1):
            self.where, self.gain = where, gain
    """


def test_every_built_in_name_is_there():
    assert {kind: sorted(names) for kind, names in plugins.BUILT_IN.items()} == {
        "source": ["demo", "device", "file"],
        "sink": ["audio", "json", "midi", "osc", "record", "split", "terminal", "virtual"],
        "model": ["onnx"],
    }
    for kind, names in plugins.BUILT_IN.items():
        for name in names:
            make, argument = plugins.factory(kind, name)
            assert callable(make) and argument is None, name


@pytest.mark.parametrize("argument", ["a.wav", r"C:\x.wav", "/a:b/c.wav", "fluidr3:40", "", "pkg.mod:Class"])
def test_everything_after_the_first_colon_is_the_argument(argument):
    assert plugins.factory("source", f"file:{argument}") == (FileSource, argument)


@pytest.mark.parametrize("spec", ["nix", "nix:a", "", ":", "song.wav", r"C:\x.wav", "/tmp/a.wav", "pkg.mod:"])
def test_an_unknown_name_lists_the_known_ones(spec):
    with pytest.raises(UserError) as error:
        plugins.resolve("source", spec)
    assert repr(spec) in str(error.value)
    assert "demo, device, file" in str(error.value)
    assert "\n" not in str(error.value)


def test_entry_points_of_other_packages_are_found_by_name(folder):
    write_module(folder, "fake_mic", MIC)
    write_dist(folder, "fake_package", "[realtime_mpe.sources]\nfakemic = fake_mic:Mic\n")
    source = plugins.resolve("source", "fakemic:left", gain=3)
    assert (source.where, source.gain) == ("left", 3)
    assert plugins.known("source")["fakemic"] == "fake_mic:Mic (fake_package 1.2)"
    assert "fakemic" not in plugins.known("sink")
    with pytest.raises(UserError, match="fakemic"):
        plugins.resolve("source", "nix")


def test_known_says_what_is_built_in():
    assert plugins.known("model")["onnx"] == "realtime_mpe.model:open_model (built in)"


def test_a_package_cannot_replace_a_built_in_name(folder):
    write_dist(folder, "fake_package", "[realtime_mpe.sources]\nfile = fake_nothing:Nothing\n")
    assert plugins.factory("source", "file:x") == (FileSource, "x")
    assert "built in" in plugins.known("source")["file"]


def test_two_packages_that_offer_one_name_are_both_named(folder):
    write_dist(folder, "fake_one", "[realtime_mpe.sinks]\nlight = fake_one:Light\n")
    write_dist(folder, "fake_two", "[realtime_mpe.sinks]\nlight = fake_two:Light\n")
    with pytest.raises(UserError, match="fake_(one|two) 1.2 and fake_(one|two) 1.2"):
        plugins.factory("sink", "light")


@pytest.mark.parametrize(
    ("spec", "argument"),
    [("fake_mic:Mic:2", "2"), ("fake_mic:Mic:a:b", "a:b"), ("fake_pack.inner:Mic:x", "x")],
)
def test_an_import_path_names_any_class(folder, spec, argument):
    write_module(folder, "fake_mic", MIC)
    (folder / "fake_pack").mkdir()
    write_module(folder / "fake_pack", "inner", MIC)
    assert plugins.resolve("source", spec).where == argument


def test_an_import_path_reaches_nested_classes(folder):
    write_module(folder, "fake_mic", MIC)
    make, argument = plugins.factory("sink", "fake_mic:Mic.Inner")
    assert make.__qualname__ == "Mic.Inner" and argument is None


def test_only_what_is_chosen_is_imported(folder):
    for name in ("fake_a", "fake_b", "fake_c"):
        write_module(folder, name, MIC)
    write_dist(folder, "fake_package", "[realtime_mpe.sources]\na = fake_a:Mic\nb = fake_b:Mic\n")
    plugins.known("source")
    with pytest.raises(UserError):
        plugins.factory("source", "fake_c")
    assert not {"fake_a", "fake_b", "fake_c"} & set(sys.modules)
    plugins.resolve("source", "a:1")
    assert {"fake_a", "fake_b", "fake_c"} & set(sys.modules) == {"fake_a"}


def test_choosing_a_file_loads_neither_sound_devices_nor_midi_nor_the_model_runtime():
    code = """
        import sys
        from realtime_mpe import plugins
        for kind in plugins.BUILT_IN:
            plugins.known(kind)
        plugins.factory("source", "file:x.wav")
        loaded = {"sounddevice", "onnxruntime", "mido", "rtmidi", "torch", "scipy"} & set(sys.modules)
        assert not loaded, loaded
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import fake_missing_library", "No module named 'fake_missing_library'"),
        ("raise RuntimeError('two\\nlines')", "two lines"),
        ("def broken(:", "invalid syntax"),
        ("raise KeyError", "KeyError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(folder, text, reason):
    write_module(folder, "fake_broken", text)
    with pytest.raises(UserError) as error:
        plugins.resolve("sink", "fake_broken:Sink")
    assert "fake_broken:Sink" in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)


def test_names_that_lead_nowhere_are_named(folder):
    write_module(folder, "fake_mic", MIC + "\n    number = 3\n")
    with pytest.raises(UserError, match="fake_mic has no 'Mik'"):
        plugins.resolve("source", "fake_mic:Mik")
    with pytest.raises(UserError, match="int, not a class"):
        plugins.resolve("source", "fake_mic:number")
    with pytest.raises(UserError, match="No module named 'fake_no'"):
        plugins.resolve("source", "fake_no.module:Mic")


RECORDER = """
    class Recorder:
        def __init__(self, path, gain=1.0, *, loud=False):
            self.made_with = path, gain, loud
    """


@pytest.fixture
def recorder(folder):
    write_module(folder, "fake_recorder", RECORDER)
    write_dist(folder, "fake_package", "[realtime_mpe.sinks]\nrecorder = fake_recorder:Recorder\n")


def test_argument_and_options_arrive(recorder):
    assert plugins.resolve("sink", "recorder:a", gain=2.0, loud=True).made_with == ("a", 2.0, True)
    assert plugins.resolve("sink", "recorder", path="b").made_with == ("b", 1.0, False)


def test_an_option_that_is_not_taken_is_named_and_not_eaten(recorder):
    with pytest.raises(UserError, match="'recorder' has no option 'gian'; it takes gain, loud"):
        plugins.resolve("sink", "recorder:a", gian=2.0)


def test_missing_and_superfluous_arguments_are_explained(recorder):
    with pytest.raises(UserError, match="recorder:PATH"):
        plugins.resolve("sink", "recorder")
    with pytest.raises(UserError, match="file:PATH"):
        plugins.resolve("source", "file")
    with pytest.raises(UserError, match="'demo' takes no argument, but 'x'"):
        plugins.resolve("source", "demo:x")
    with pytest.raises(UserError, match="multiple values"):
        plugins.resolve("sink", "recorder:a", path="b")


def test_what_a_plugin_raises_itself_passes_through(folder):
    write_module(folder, "fake_mic", "def make(x):\n    raise TypeError('a bug of the plugin')\n")
    with pytest.raises(TypeError, match="a bug of the plugin"):
        plugins.resolve("source", "fake_mic:make:1")
