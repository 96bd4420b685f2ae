"""Write docs/reliability.md: every fault with the test that holds it, run now, and what was killed, filled and fuzzed.

    python benchmarks/reliability.py docs/reliability.md --faults FAULTS.json --more MORE.json --fuzz FUZZ.json

The records are those of `faults.py`, `faults_more.py` and `fuzz.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: seconds after which an input counts as a hang
SLOWEST = 10
#: fault, where, what is done, the test that holds it
FAULTS = (
    (
        "SIGKILL between two steps",
        "a training",
        "goes on at the last state: the same weights and history",
        "test_saving.py::test_killed_and_taken_up_is_never_killed",
    ),
    (
        "SIGKILL again and again",
        "a training",
        "the same",
        "test_saving.py::test_killed_again_and_again_and_without_a_state_it_is_the_same_too",
    ),
    (
        "interrupted",
        "between rounds",
        "goes on at the last finished round",
        "test_pipeline.py::test_an_interrupted_run_resumes_at_the_last_finished_round_to_the_same_weights",
    ),
    (
        "interrupted",
        "between two attempts at a promise",
        "goes on with the second",
        "test_rounds.py::test_a_run_stopped_between_attempts_resumes_to_the_same_weights",
    ),
    (
        "interrupted",
        "while units fade",
        "begins that round anew",
        "test_fading.py::test_a_round_fades_cuts_and_goes_on_and_an_interrupted_one_begins_anew",
    ),
    (
        "killed",
        "a study, inside an arm and between arms",
        "runs nothing twice",
        "test_study.py::test_a_study_killed_inside_an_arm_and_between_arms_runs_nothing_twice",
    ),
    (
        "SIGTERM, Ctrl-C",
        "a training",
        "writes its state after the step and leaves with 128 + the signal",
        "test_saving.py::test_told_to_stop_it_writes_its_state_first",
    ),
    (
        "SIGTERM, Ctrl-C, or a second one",
        "anywhere else",
        "leaves at once; what is finished is on disk",
        "test_saving.py::test_outside_of_a_training_and_the_second_time_a_signal_stops_at_once",
    ),
    (
        "file cut short, bit flipped, file missing, record unreadable, not written to its end",
        "state of a training",
        "told, removed, the training begins anew",
        "test_saving.py::test_a_torn_state_is_told_and_removed",
    ),
    (
        "state of another training",
        "the same folder",
        "not taken up",
        "test_saving.py::test_the_state_of_another_training_is_not_taken_up",
    ),
    (
        "disk full",
        "state of a training: weights, optimizer, record",
        "refused with the megabytes that are free; the state before stays",
        "test_saving.py::test_a_full_disk_is_told_with_its_numbers_and_the_state_before_stays",
    ),
    ("disk full, any failure", "writing a checkpoint", "refused; the folder before stays", "test_checkpoint.py"),
    (
        "bit flipped",
        "model of a finished round",
        "told, that round is made again: the same weights",
        "test_faults.py::test_a_finished_round_whose_model_is_broken_is_made_again_to_the_same_weights",
    ),
    (
        "bit flipped",
        "part of a round",
        "made again: the same weights",
        "test_faults.py::test_a_broken_part_of_a_round_is_made_again_to_the_same_weights",
    ),
    (
        "bit flipped, file cut short",
        "shard of the teacher's cache",
        "told, removed, the teacher is asked again",
        "test_faults.py::test_a_broken_shard_of_the_teachers_cache_is_told_and_asked_again",
    ),
    (
        "a second process",
        "the same run folder",
        "refused with pid, host and since when",
        "test_faults.py::test_a_second_process_is_refused_by_name_and_let_in_when_the_first_is_gone",
    ),
    (
        "loss NaN or infinite",
        "a training",
        "told; begins again at half the rate, twice; then refused",
        "test_faults.py::test_a_loss_that_is_no_number_is_told_tried_lower_and_refused",
    ),
    (
        "out of memory (CUDA, CPU)",
        "a training",
        "told; begins again with half of the pictures at once, down to one; then refused",
        "test_enduring.py::test_out_of_memory_takes_half_of_the_pictures_at_once_down_to_one",
    ),
    ("another model, data set or recipe", "an existing run folder", "refused with both hashes", "test_pipeline.py"),
    (
        "labels, pictures or cache that do not belong together",
        "start of a run",
        "refused: the teacher against itself does not start at 0",
        "test_faults.py::test_a_teacher_that_is_not_its_own_student_is_refused",
    ),
    ("labels a token off, another teacher's states", "check-data", "error: misaligned", "test_checkdata_model.py"),
    (
        "broken, huge, animated, two-faced pictures, leaks, paths out of the folder, 30 other kinds",
        "check-data",
        "each by name with rows ([check-data.md](check-data.md))",
        "test_checkdata.py",
    ),
    ("broken rows", "reading data", "counted, named, skipped up to a share, else refused", "test_data.py"),
    (
        "pictures cut short, of another kind, two-faced, SVG, whatever their decoders raise",
        "reading data, check-data, serve",
        "a broken row with its reason",
        "test_picture_files.py::test_what_is_no_whole_picture_within_the_limits_is_a_broken_row_with_its_reason",
    ),
    (
        "bombs: pixels, bytes, text chunks",
        "the same",
        "not decoded, not read; a broken row with the number",
        "test_picture_files.py::test_nothing_is_decoded_of_what_the_header_says_is_too_large",
    ),
    (
        "paths and links out of the data folder, pipes, devices",
        "reading data",
        "not opened; a broken row unless the folder is allowed by name",
        "test_picture_files.py::test_a_path_that_leads_out_of_the_data_is_a_broken_row_unless_its_folder_is_allowed",
    ),
    (
        "SIGKILL",
        "a worker process of check-data",
        "told, exit code 2; nothing waits for it",
        "test_checkdata.py::test_a_worker_that_dies_is_told_and_nothing_waits_for_it",
    ),
    (
        "a packed file under the name of a table",
        "reading data",
        "refused before it is unpacked",
        "test_fuzz.py::test_a_packed_table_is_not_unpacked",
    ),
    (
        "YAML that expands without end, names types, or has dates that there are not",
        "recipes, studies, settings",
        "refused with the line",
        "test_fuzz.py::test_yaml_that_python_stumbles_over_is_refused",
    ),
    (
        "bytes changed at random",
        "every parser",
        "a value or a refusal with its reason",
        "test_fuzz.py::test_whatever_is_read_ends_in_a_value_or_a_refusal",
    ),
    (
        "a wrong weight, key, parameter count, pickle, code, changed or added file",
        "`final/`",
        "no certificate, no `final/`; `verify` names it ([verify.md](verify.md))",
        "test_certificate.py",
    ),
    ("pickles that are more than weights", "convert", "refused; nothing is run", "test_converting.py"),
    ("missing, truncated, contradicting files", "a model folder", "refused with what to do", "test_intake.py"),
    (
        "SIGKILL between two steps, at the end of a training",
        "finetune",
        "goes on there: the same weights",
        "test_finetuning.py",
    ),
    ("SIGKILL between two steps", "a control arm", "goes on at its last state: the same answers", "test_controls.py"),
    (
        "clock jumps by years and hours, both ways",
        "a training",
        "nothing changes: intervals and seconds go by a monotonic clock",
        "test_saving.py::test_the_wall_clock_may_jump",
    ),
    ("read-only or missing rights", "--out", "refused with the reason before anything is loaded", "test_files.py"),
    (
        "output turns read-only",
        "a round",
        "ends with the file and the reason; the same command goes on from there",
        "test_faults.py::test_an_output_that_turns_read_only_is_told_and_the_run_goes_on_from_there",
    ),
    (
        "disk too small",
        "before a run",
        "refused with what is needed, of what, and what is free",
        "test_room.py::test_a_disk_that_is_too_small_is_refused_before_anything_runs",
    ),
    (
        "disk fills meanwhile",
        "before a round",
        "the same; rounds made so far stay",
        "test_room.py::test_a_disk_that_fills_meanwhile_is_refused_before_the_next_round",
    ),
    (
        "a model that was let go (--keep-rounds) is needed again",
        "a run that goes on",
        "told, its rounds are made again: the same weights",
        "test_room.py::test_rounds_whose_models_went_are_made_again_where_they_are_needed",
    ),
    (
        "killed",
        "while a model is let go",
        "none the worse",
        "test_room.py::test_a_run_killed_while_a_model_goes_is_none_the_worse",
    ),
    (
        "the certificate's process hangs",
        "the end of a run, verify",
        "ended after minutes by size, told",
        "test_certificate.py::test_a_new_process_that_hangs_is_ended_and_told",
    ),
    (
        "another model or data set, a changed weight, other answers, another figure",
        "reproduce",
        "each named; fails where machine and versions are the same",
        "test_reproducing.py",
    ),
)
REST = """
**On a CPU** the same seed gives the same bytes on the same machine and versions, interrupted or not; `slimlmm reproduce RUN
--out DIR` makes a run again from its own folder and compares files, answers and results. It takes as many threads as the run
had. Runs of one study share what the teacher said; rows that another run asked about have been asked beside other rows, which may
give other last bits, so such a run is reproduced in its answers and figures, and in its bits only by the study from its start.

**On a GPU** this has not been tried, and bits may differ from run to run. What is known to do so: sums of atomics in backward
passes (`index_add`, `scatter_add`, embeddings, interpolated position tables); backward passes of fused attention (flash,
memory-efficient); cuBLAS with several workspaces (`CUBLAS_WORKSPACE_CONFIG=:4096:8` ends that) and its choice of kernels by
free memory; cuDNN's choice of convolutions for patch embeddings; kernels that `compile: true` tunes on the spot; TF32 and
bfloat16 sums on another GPU; the order of all-reduce over several processes. `reproduce` then compares answers and accuracy.

No training has a data-loader worker that could die: its rows are read in the process itself. After a kill between two states,
the seconds of the record leave out what was lost. Optimizer states are the Trainer's own files in the run folder, read back as
weights only.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--faults", type=Path, required=True)
    parser.add_argument("--more", type=Path, required=True)
    parser.add_argument("--fuzz", type=Path, required=True, nargs="+")
    arguments = parser.parse_args()
    faults, more, *fuzz = (json.loads(path.read_text()) for path in (arguments.faults, arguments.more, *arguments.fuzz))
    prove()
    arguments.page.write_text(page(faults, more, fuzz), encoding="utf-8")


def prove() -> None:
    """Run the test of every fault; one that fails ends it."""
    tests = list(dict.fromkeys(test for _, _, _, test in FAULTS))
    command = [sys.executable, "-m", "pytest", "-q", "--thorough", *(f"tests/{test}" for test in tests)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])


def page(faults: dict[str, Any], more: dict[str, Any], fuzz: Sequence[dict[str, Any]]) -> str:
    """Return the page as Markdown."""
    at = ", ".join(f"{name} {count}" for name, count in sorted(faults["killed_at"].items(), key=lambda one: -one[1]))
    kills = (
        f"{faults['kills']} times SIGKILL at random moments in {faults['runs']} runs of `compress` (last thing told "
        f"before: {at}); {faults['equal']} of {faults['runs']} runs ended byte for byte like the one that was not killed"
    )
    verbs = "; ".join(f"`{one['verb']}` {one['kills']} times, {one['sound']} of them" for one in more["killed"])
    lines = [
        "# What happens when something goes wrong",
        "",
        "Generated by `benchmarks/reliability.py`, which runs the tests (`make faults`).",
        "",
        f"**Killed**: {kills} ({_day(faults)}).",
        "",
        f"**Other verbs killed**, each anew: {verbs} with nothing or all at OUT after the kill, and after the same command "
        f"again the bytes of one that was not killed and nothing beside ({_day(more)}).",
        "",
    ]
    if filled := more["filled"]:
        lines += [
            f"**Disk filled** at a random moment under {filled['fills']} runs: {filled['finished']} needed no more room, "
            f"{filled['caught']} of the other {filled['fills'] - filled['finished']} ended with exit code 2 and the reason; "
            f"{filled['equal']} of all were byte for byte the same after room was made ({_day(more)}).",
            "",
        ]
    return "\n".join([*lines, *_fuzzed(fuzz), *_table(), REST.strip(), ""])


def _day(record: dict[str, Any]) -> str:
    return str(record["environment"]["created"][:10])


def _fuzzed(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of parsers: one line of each, the engines beside each other."""
    lines = [
        f"**Fuzzed**: each input ended in a value or in a refusal with its reason, in less than {SLOWEST} s; what did not is "
        f"a find ({', '.join(sorted({_day(one) for one in records}))}).",
        "",
        "| parser | engine | inputs | accepted | refused | finds left | slowest |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        for one in record["parsers"]:
            counts = " | ".join(f"{one[key]:,}" for key in ("inputs", "accepted", "refused", "found"))
            lines.append(f"| {one['parser']} | {one['engine']} | {counts} | {one['slowest_s']:.2f} s |")
    return [*lines, ""]


def _table() -> list[str]:
    rows = [f"| {what} | {where} | {does} | `{test}` |" for what, where, does, test in FAULTS]
    return [
        f"{len(FAULTS)} kinds of fault:",
        "",
        "| fault | where | what slimlmm does | test |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


if __name__ == "__main__":
    main()
