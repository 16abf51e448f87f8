"""Files that changed after they were written are found, named and made again."""

import pytest

from tiny_run import TinyRun


def flip_bit(path, position=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 1
    path.write_bytes(data)


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("damage", [flip_bit, truncate])
def test_a_damaged_chunk_is_found_repaired_and_computed_again(warm, copied, unbroken, damage):
    chunk = sorted((copied.home / "outputs").glob("*/c.0.0"))[1]
    damage(chunk)
    found = warm.run("store", "verify", home=copied.home)
    assert found.code == 1, found.err
    assert f"{chunk.parent.name[:12]}/{chunk.name}" in found.err
    assert "--repair" in found.err
    assert len([line for line in found.err.splitlines() if line.startswith("error: ")]) == 1
    repaired = warm.run("store", "verify", "--repair", home=copied.home)
    assert repaired.code == 1, "what was lost has to be made again"
    assert not chunk.exists()
    labelled = warm.run("label", copied.folder, home=copied.home)
    assert labelled.code == 0, labelled.err
    assert "labels: unchanged, reused" not in labelled.err
    verified = warm.run("store", "verify", copied.folder, home=copied.home)
    assert verified.code == 0, verified.err
    assert "3 entries, of which 3 recomputed in part" in verified.out
    finished = warm.run("distill", copied.folder, home=copied.home)
    assert "student: unchanged, reused" in finished.err, "the outputs are the same bits again"
    assert copied.results() == unbroken.results()


def test_damage_that_only_reading_finds_stops_the_training(warm, copied, unbroken):
    chunk = min((copied.home / "outputs").glob("*/c.0.0"))
    truncate(chunk)
    changed = ["--set", "distillation.temperature=2"]
    trained = warm.run("train", copied.folder, *changed, home=copied.home)
    assert trained.code == 1, trained.err
    assert "Traceback" not in trained.err
    assert f"{chunk.name} is damaged" in trained.err
    assert warm.run("store", "verify", "--repair", home=copied.home).code == 1
    assert warm.run("label", copied.folder, home=copied.home).code == 0
    assert warm.run("train", copied.folder, home=copied.home).code == 0
    assert copied.store_files() == unbroken.store_files()


@pytest.mark.parametrize("damage", [flip_bit, lambda path: path.unlink()])
def test_a_changed_file_of_a_run_is_noticed_by_the_next_stage(warm, copied, unbroken, damage):
    path = copied.folder / "student" / "model.safetensors"
    damage(path)
    for command in ("evaluate", "export", "report"):
        finished = warm.run(command, copied.folder, home=copied.home)
        assert finished.code == 2, finished.err
        assert "Traceback" not in finished.err
        assert "model.safetensors" in finished.err
        assert f"understudy train {copied.folder}" in finished.err
    assert warm.run("distill", copied.folder, home=copied.home).code == 0
    assert copied.results() == unbroken.results()


@pytest.mark.parametrize("kind", ["split", "labels", "control"])
def test_a_changed_record_is_made_again(warm, copied, unbroken, kind):
    path = copied.folder / kind / "record.json"
    path.write_text(path.read_text().replace('"payload": {', '"payload": {"more": 1,', 1))
    finished = warm.run("resume", copied.folder, home=copied.home)
    assert finished.code == 0, finished.err
    assert f"{kind}: started" in finished.err
    assert copied.results() == unbroken.results()


def test_a_damaged_training_checkpoint_is_named(warm, copied):
    for name in ("record.json", "model.safetensors"):
        (copied.folder / "student" / name).unlink()
    checkpoint = copied.folder / "student" / "checkpoint.pt"
    truncate(checkpoint)
    finished = warm.run("resume", copied.folder, home=copied.home)
    assert finished.code == 2, finished.err
    assert str(checkpoint) in finished.err
    assert "Delete it" in finished.err
    assert "Traceback" not in finished.err


def test_two_processes_do_not_work_in_one_run_folder(warm, tiny_recipe, fresh):
    first = warm.start("distill", tiny_recipe, "--out", fresh.folder, home=fresh.home)
    while not (fresh.folder / "recipe.yaml").exists():
        assert first.poll() is None
    second = warm.run("resume", fresh.folder, home=fresh.home)
    assert second.code == 2, second.err
    assert f"another process is working on {fresh.folder}" in second.err
    first.kill()
    first.wait()
    # The lock went with the process.
    third = warm.run("teach", fresh.folder, home=fresh.home)
    assert third.code == 0, third.err


def test_two_runs_label_into_one_store(warm, tiny_recipe, unbroken, fresh, tmp_path):
    """Two writers of the same entries: each finds whole chunks, whoever wrote them."""
    runs = [TinyRun(tmp_path / name, fresh.home) for name in ("one", "other")]
    for command in ("teach", "label"):
        commands = [
            warm.start(command, tiny_recipe, "--out", run.folder, home=run.home) for run in runs
        ]
        for finished in [command.wait() for command in commands]:
            assert finished.code == 0, finished.err
    for run in runs:
        assert run.record("labels").hash == unbroken.record("labels").hash
        assert run.store_files() == unbroken.store_files()
