"""Options and files that are wrong: one line that says what to write instead, the right exit code, and nothing written."""

from __future__ import annotations

from edgeprune.testing.command_line import CommandLine, one_line

INPUT = ("--input", "image=1x3x16x16:float32")
TABLE = ("--table", "table.parquet")


def refuse(edgeprune: CommandLine, *arguments: str, code: int = 2, parts: tuple[str, ...] = ()) -> str:
    done = edgeprune.run(*arguments)
    line = one_line(done.returncode, done.stdout, done.stderr, code)
    for part in parts:
        assert part in line, line
    return line


def test_bad_input_is_one_line_with_the_right_exit_code(edgeprune: CommandLine) -> None:
    folder = edgeprune.folder
    (folder / "corrupt.parquet").write_bytes((folder / "table.parquet").read_bytes()[:-500])
    (folder / "foreign.parquet").write_text("PAR1 not a table")
    (folder / "tables").mkdir()
    prune = ("prune", "net.py:build", *INPUT, "--latency", "50%", "--out", "bad")
    refuse(edgeprune, *prune, "--table", "missing.parquet", code=2, parts=("missing.parquet",))
    refuse(edgeprune, *prune, "--table", "corrupt.parquet", parts=("corrupt.parquet",))
    refuse(edgeprune, "fit", "foreign.parquet", parts=("foreign.parquet",))
    refuse(edgeprune, *prune, *TABLE, "--latency", "50", parts=("a number with a unit", "--latency 12ms"))
    profile = "profile net.py:build --input image=1x3x16x16:float32"
    percentile = (*prune, *TABLE, "--percentile", "95")
    refuse(edgeprune, *percentile, code=4, parts=("it holds medians", f"{profile} --percentiles"))
    energy = ("must hold the energy per inference of networks", f"{profile} --energy")
    refuse(edgeprune, *prune, *TABLE, "--energy", "30mJ", code=4, parts=energy)
    refuse(edgeprune, *prune, *TABLE, "--min-width", "first", parts=("--min-width must be written",))
    refuse(edgeprune, *prune, *TABLE, "--keep", "frist", parts=("frist",))
    idle = (*prune, *TABLE, "--reallocate-every", "9")
    refuse(edgeprune, *idle, parts=("--reallocate-every needs --soft-masking, found none",))
    without_data = ("the taylor criterion must have a task for its data, found none", "or the data-free criterion l2")
    refuse(edgeprune, *prune, *TABLE, "--criterion", "taylor", parts=without_data)
    refuse(edgeprune, *prune, *TABLE, "--blocks", parts=("--blocks needs --task", "--task FILE.py:FACTORY"))
    wrong_shape = ("prune", "net.py:build", "--input", "image=1x4x16x16", "--latency", "50%", *TABLE)
    refuse(edgeprune, *wrong_shape, parts=("must run on its example inputs",))
    refuse(edgeprune, "compile", "first", parts=("no prune.json in it",))
    refuse(edgeprune, "compile", "net.py:build", *INPUT, "--dla", "0", parts=("--dla needs --backend tensorrt",))
    refuse(edgeprune, "report", ".", parts=("there is no report.json",))
    refuse(edgeprune, "deploy", "tables", parts=("manifest.json",))
    assert not (folder / "bad").exists()


def test_an_output_folder_of_something_else_is_left_alone(edgeprune: CommandLine) -> None:
    other = edgeprune.folder / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    prune = ("prune", "net.py:build", *INPUT, *TABLE, "--latency", "75%", "--out", "precious")
    refuse(edgeprune, *prune, parts=("must be empty or hold an earlier run",))
    assert (other / "thesis.txt").read_text() == "years of work"


def test_a_meter_or_a_rail_without_energy_is_a_mistake(edgeprune: CommandLine) -> None:
    profile = ("profile", "net.py:build", *INPUT)
    refuse(edgeprune, *profile, "--meter", "echo 1", parts=("--meter must come with --energy",))
    here = (*profile, "--host-meter", "echo 1")
    refuse(edgeprune, *here, parts=("--host-meter must come with --energy and without --meter, found it alone",))
    refuse(edgeprune, *here, "--energy", "--meter", "echo 1", parts=("without --meter, found --meter with it",))
    refuse(edgeprune, *profile, "--rail", "VIN", parts=("--rail must come with --energy",))


def test_a_table_that_took_minutes_is_not_written_over(edgeprune: CommandLine) -> None:
    held = (edgeprune.folder / "table.parquet").read_bytes()
    parts = ("the table to write must not be there yet, found table.parquet", "--table table.parquet", "--replace")
    for more in ([], ["--dry-run"], ["--out", "table.parquet"]):
        refuse(edgeprune, "profile", "net.py:build", *INPUT, *more, parts=parts)
    assert (edgeprune.folder / "table.parquet").read_bytes() == held


def test_a_power_mode_is_not_chosen_for_a_dry_run_nor_on_a_board_without_any(edgeprune: CommandLine) -> None:
    mode = ("profile", "net.py:build", *INPUT, "--power-mode", "MAXN", "--out", "new.parquet")
    refuse(edgeprune, *mode, "--dry-run", parts=("--dry-run leaves the board as it is",))
    refuse(edgeprune, *mode, parts=("must say how its power mode is chosen",))


def test_a_run_that_is_not_there_is_not_taken_for_a_factory(edgeprune: CommandLine) -> None:
    parts = ("there is no folder 'prunde'", "edgeprune prune", "package.module:factory")
    refuse(edgeprune, "compile", "prunde", parts=parts)


def test_what_is_written_wrong_comes_with_what_to_write(edgeprune: CommandLine) -> None:
    folder = edgeprune.folder
    compiling = ("compile", "net.py:build", "--out", "wrong")
    named = "Try: --input x=1x3x16x16, with the input's name"
    refuse(edgeprune, *compiling, "--input", "1x3x16x16", parts=(named,))
    refuse(
        edgeprune,
        *(*compiling, "--input", "image=1x3x16x16:flot32"),
        parts=("Try: --input image=1x3x16x16:float32",),
    )
    (folder / "weights").mkdir()
    (folder / "weights" / "net.safetensors").touch()
    refuse(edgeprune, *compiling, *INPUT, "--weights", "nett.safetensors", parts=("Try: weights/net.safetensors",))
    refuse(edgeprune, "compile", "models/net.py:build", *INPUT, parts=("there is no ", "Try: net.py"))
    refuse(edgeprune, "compile", "zzzzzzzz.py:build", *INPUT, parts=(f"Try: a path from {folder}",))
    wrong_key = ("device", "add", "bench", "--ssh", "a@b", "--host-key", "SHA256:abc")
    line = refuse(edgeprune, *wrong_key, parts=("43 characters after SHA256:", "ssh-keygen -lf"))
    assert "\\" not in line
    assert "[A-Za-z" not in line
