"""How a global batch is cut and laid out: nothing lost, budgets kept, ranks even, the same targets in every layout."""

import doctest
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.config import parse
from mtl.data import batches, plan
from mtl.data.batches import Layout, TrainBatches, ValidationGroups
from mtl.data.collate import TILES, collate, deal, row_length_for, widened
from mtl.data.encoded import Encoded, TaskData
from mtl.data.mix import Mix

examples = st.lists(st.integers(2, 60), max_size=50)


@settings(deadline=None)
@given(examples, st.integers(1, 5), st.integers(60, 300), st.sampled_from([None, 60, 97]))
def test_deal(lengths, world, tokens, row_length):
    if row_length is not None:
        tokens = max(tokens, row_length)
    ranks = deal(lengths, world, tokens, row_length)
    assert len(ranks) == world
    assert sorted(i for rank in ranks for micro in rank for row in micro for i in row) == list(
        range(len(lengths))
    )
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) >= 1
    positions = []
    for rank in ranks:
        cost = [
            len(micro) * max((sum(lengths[i] for i in row) for row in micro), default=0)
            for micro in rank
        ]
        assert max(cost) <= tokens
        positions.append(sum(cost))
        for micro in rank:
            for row in micro:
                assert row and (
                    len(row) == 1
                    if row_length is None
                    else sum(lengths[i] for i in row) <= row_length
                )
    largest = max(
        len(m) * max((sum(lengths[i] for i in r) for r in m), default=0)
        for rank in ranks
        for m in rank
    )
    assert max(positions) - min(positions) <= largest


def test_deal_is_even_and_tight():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 120, 256).tolist()
    for row_length, waste in ((None, 1.12), (256, 1.04)):
        ranks = deal(lengths, 4, 1024, row_length)
        positions = [
            sum(len(m) * max(sum(lengths[i] for i in r) for r in m) for m in rank) for rank in ranks
        ]
        assert max(positions) * 4 <= waste * sum(lengths)


def test_deal_gives_every_rank_rows_when_one_could_hold_them_all():
    assert deal([10] * 4, 2, 1000) == [[[[0], [1]]], [[[2], [3]]]]
    assert [
        [sorted(sum(micro, [])) for micro in rank] for rank in deal([10] * 4, 2, 1000, 100)
    ] == [[[0, 1]], [[2, 3]]]


def test_deal_keeps_one_long_row_apart_from_many_short_ones():
    ranks = deal([100] + [10] * 10, 2, 1000)
    assert sorted(sum(ranks[0][0], [])) == [0] and len(ranks[1][0]) == 10


def test_deal_gives_back_what_the_largest_takes():
    ranks = deal([40, 30, 20, 10], 2, 40)
    assert ranks == [[[[0]], [[3]]], [[[1]], [[2]]]]


def test_deal_with_more_ranks_than_examples():
    ranks = deal([5, 7], 4, 10)
    assert ranks == [[[[1]]], [[[0]]], [[]], [[]]]
    assert deal([], 2, 10) == [[[]], [[]]]


def test_deal_refuses_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"an example of 11 positions, wanted at most batch.tokens = 10"
    ):
        deal([3, 11], 1, 10)
    with pytest.raises(
        ValueError, match=r"an example of 11 positions, wanted at most row_length = 8"
    ):
        deal([3, 11], 1, 10, 8)
    with pytest.raises(ValueError, match=r"row_length 12, wanted at most batch.tokens = 10"):
        deal([3], 1, 10, 12)


@given(st.integers(1, 40), st.integers(2, 600), st.integers(0, 5000))
def test_rows_are_widened_to_whole_tiles(rows, width, more):
    tokens = rows * width + more
    wider = widened(rows, width, tokens)
    assert width <= wider and rows * wider <= tokens and 8 * wider <= 9 * width
    fits = [n for n in range(width, 9 * width // 8 + 1) if rows * n <= tokens]
    for tile in TILES:  # the first tile that any width allows, and its least width
        whole = [n for n in fits if rows * n % tile == 0]
        if whole:
            assert wider == whole[0]
            return
    assert wider == width


def test_packed_rows_fill_whole_tiles_with_little_padding():
    """16 rows of the quickstart's kind: as many rows of whatever length waste least, not as few as a row length allows."""
    rng = np.random.default_rng(0)
    share, odd = [], 0
    for _ in range(100):
        lengths = np.maximum(
            5, rng.choice([45, 19, 28, 43, 22, 33], 16) + rng.integers(-10, 20, 16)
        ).tolist()
        ((micro,),) = deal(lengths, 1, 1024, 256)
        width = widened(len(micro), max(sum(lengths[i] for i in row) for row in micro), 1024)
        share.append(len(micro) * width / sum(lengths))
        odd += len(micro) * width % 32 > 0
    assert np.mean(share) < 1.05 and max(share) < 1.13
    assert odd <= 5


def test_flash_attention_gets_one_row_a_micro_batch():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 120, 64).tolist()
    assert [[len(micro) for micro in rank] for rank in deal(lengths, 2, 1024, 1024)] == [
        [1] * 3
    ] * 2
    # Rows of less than half a micro-batch, where two would fit into one.
    ranks = deal([16, 29, 33, 17, 23, 21, 33, 27], 2, 100, 100)
    assert [[len(micro) for micro in rank] for rank in ranks] == [[1, 1], [1, 1]]


def test_row_length():
    assert row_length_for(64, 4096, dense_mask=True) == 256
    assert row_length_for(700, 4096, dense_mask=True) == 700
    assert row_length_for(64, 4096, dense_mask=False) == 4096
    assert row_length_for(64, 128, dense_mask=True) == 128


A = (np.array([1, 2, 3], np.int32), np.array([False, True, True]), 0)
B = (np.array([9, 8], np.int32), np.array([False, True]), 2)
C = (np.array([4, 9, 9, 5], np.int32), np.array([False, False, True, False]), 1)


def test_collate_padded():
    batch = collate([[A], [C], [B]], pad_id=9, packed=False)
    assert batch.input_ids.tolist() == [[1, 2, 9], [4, 9, 9], [9, 9, 9]]
    # By length: 9 is data as well as padding.
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert [row[:n] for row, n in zip(batch.position_ids.tolist(), (2, 3, 1), strict=True)] == [
        [0, 1],
        [0, 1, 2],
        [0],
    ]
    assert batch.at.tolist() == [0, 1, 4, 6] and batch.most == 4
    assert batch.labels.tolist() == [2, 3, 9, 8] and batch.task.tolist() == [0, 0, 1, 2]
    assert batch.counts(4).tolist() == [2, 1, 1, 0]
    assert {
        batch.input_ids.dtype,
        batch.position_ids.dtype,
        batch.labels.dtype,
        batch.task.dtype,
    } == {torch.int64}


def test_collate_packed():
    batch = collate([[A, B, B], [C]], pad_id=0, packed=True)
    assert batch.input_ids.tolist() == [[1, 2, 9, 9], [4, 9, 9, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]
    assert batch.attention_mask is None
    assert batch.at.tolist() == [0, 1, 2, 3, 5] and batch.most == 5
    assert collate([[A, B, B], [C]], pad_id=0, packed=True, most=9).most == 9
    assert batch.labels.tolist() == [2, 3, 8, 8, 9] and batch.task.tolist() == [0, 0, 2, 2, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_batches_fill_whole_tiles_where_there_is_room(packed):
    """Rows of 62 positions are made 64 long, through the layout that training and validation share, and lose no target."""
    ids = [int(n) for n in np.arange(3, 66)]
    split = Encoded.of([(ids, [False] + [True] * 62)] * 2)
    task, row = np.zeros(2, np.int64), np.arange(2)
    for tokens, width in ((128, 64), (126, 62)):
        layout = Layout(1, 0, tokens, 257, packed, 62 if packed else None)
        ((micro, most),) = layout.deal([split], task, row)
        batch = layout.collate(micro, most, [split], task, row)
        assert batch.input_ids.shape == (2, width) and (batch.input_ids[:, 62:] == 257).all()
        assert (
            batch.labels.tolist() == ids[1:] * 2
            and batch.input_ids.flatten()[batch.at].tolist() == ids[:-1] * 2
        )


@pytest.mark.parametrize("packed", [False, True])
def test_to_moves_everything_there_is(packed):
    moved = collate([[A]], pad_id=0, packed=packed).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6 - packed and {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("packed", [False, True])
def test_a_dummy_row_has_no_target(packed):
    batch = collate([], pad_id=7, packed=packed)
    assert batch.input_ids.tolist() == [[7, 7]] and batch.position_ids.tolist() == [[0, 1]]
    assert batch.at.shape == batch.labels.shape == batch.task.shape == (0,) and batch.most == 0
    assert batch.counts(2).tolist() == [0, 0]
    assert (batch.attention_mask is None) == packed


def toy_tasks(sizes: dict[str, int], low: int = 2, high: int = 30) -> list[TaskData]:
    """Row i of split s of task k begins with the ids (k, s, i), by which the tests find it again."""
    rng = np.random.default_rng(1)

    def split(k: int, s: int, n: int) -> Encoded:
        rows = []
        for i in range(n):
            length = int(rng.integers(max(low, 4), high))
            target = rng.random(length) < 0.5
            target[0], target[-1] = False, True
            rows.append(([k, s, i] + [5] * (length - 3), target.tolist()))
        return Encoded.of(rows)

    return [
        TaskData(name, split(k, 0, n), split(k, 1, n)) for k, (name, n) in enumerate(sizes.items())
    ]


def heads(batch) -> list[tuple[int, int, int]]:
    """(task, split, row) of the examples in a micro-batch; padding is 257 and begins no example."""
    starts = ((batch.position_ids == 0) & (batch.input_ids != 257)).nonzero().tolist()
    return [tuple(batch.input_ids[r, c : c + 3].tolist()) for r, c in starts]


@settings(deadline=None)
@given(st.integers(1, 5), st.booleans(), st.integers(30, 200))
def test_every_cut_of_a_step_holds_the_same_examples_and_targets(world, packed, tokens):
    tasks = toy_tasks({"a": 9, "b": 20, "c": 5})
    mix = Mix([t.name for t in tasks], [len(t.train) for t in tasks], [9, 20, 5], 12, 0)
    task, row = mix.batch(3)
    expected = sorted((k, 0, i) for k, i in zip(task.tolist(), row.tolist(), strict=True))
    counts = [
        sum(int(tasks[k].train.targets[i]) for k, i in zip(task, row, strict=True) if k == j)
        for j in range(3)
    ]
    found, total, micros = [], torch.zeros(3, dtype=torch.int64), set()
    for rank in range(world):
        batches = TrainBatches(
            tasks, mix, Layout(world, rank, tokens, 257, packed, 30 if packed else None), ahead=0
        )
        got = batches.batch(3)
        batches.close()
        micros.add(len(got))
        for batch in got:
            assert batch.input_ids.numel() <= tokens
            found += heads(batch)
            total += batch.counts(3)
    assert sorted(found) == expected and total.tolist() == counts and len(micros) == 1


def test_batches_are_made_ahead_and_do_not_depend_on_it():
    tasks = toy_tasks({"a": 9, "b": 20})
    mix = Mix(["a", "b"], [9, 20], [1, 1], 6, 0)
    eager, lazy = (TrainBatches(tasks, mix, Layout(1, 0, 64, 257), ahead=n) for n in (3, 0))
    for step in [0, 1, 2, 7, 8, 3]:
        for one, two in zip(eager.batch(step), lazy.batch(step), strict=True):
            assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.at, two.at)
    eager.close(), lazy.close()


def test_an_error_in_the_worker_is_raised_by_its_step():
    tasks = toy_tasks({"a": 6}, low=4, high=12) + toy_tasks({"b": 1}, low=40, high=41)
    batches = TrainBatches(tasks, Mix(["a", "b"], [6, 1], [6, 1], 1, 0), Layout(1, 0, 20, 257))
    bad = next(step for step in range(7) if batches.mix.batch(step)[0][0] == 1)
    for step in set(range(7)) - {bad}:
        assert len(batches.batch(step)) == 1
    with pytest.raises(ValueError, match="found an example of 39 positions"):
        batches.batch(bad)
    batches.close()


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_validation_groups_cover_every_row_once(groups, world, packed):
    tasks = toy_tasks({"a": 7, "b": 20, "c": 13})
    cuts = [
        ValidationGroups(tasks, groups, 0, Layout(world, rank, 64, 257, packed))
        for rank in range(world)
    ]
    g = cuts[0].groups
    assert g == min(groups, 7)
    everything = []
    for group in range(g):
        found, micros, total = [], set(), torch.zeros(3, dtype=torch.int64)
        for cut in cuts:
            got = list(cut.group(group))
            micros.add(len(got))
            for batch in got:
                found += heads(batch)
                total += batch.counts(3)
        rows = cuts[0].rows(group)
        assert sorted(found) == sorted(
            (k, 1, i) for k, some in enumerate(rows) for i in some.tolist()
        )
        assert total.tolist() == [
            int(t.validation.targets[some].sum()) for t, some in zip(tasks, rows, strict=True)
        ]
        assert len(micros) == 1
        everything += found
    assert len(everything) == len(set(everything)) == 40
    for k in range(3):
        sizes = [len(cuts[0].rows(group)[k]) for group in range(g)]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 8))
def test_groups_of_few_examples_are_fair_samples(groups, examples):
    tasks = toy_tasks({"a": 7, "b": 40, "c": 13})
    cut = ValidationGroups(tasks, groups, 0, Layout(1, 0, 64, 257), [examples] * 3)
    assert cut.groups == max(1, min(groups, 7 // examples)) and cut.parts - cut.groups in (0, 1)
    for k, task in enumerate(tasks):
        n, targets = len(task.validation), task.validation.targets
        rows = [cut.rows(part)[k] for part in range(cut.parts)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(n))
        # One row of each stratum: the j-th smallest of a group lies in the j-th stratum of all rows' target tokens.
        edges = [n * i // examples for i in range(examples + 1)]
        levels = np.sort(targets)
        for group in rows[: cut.groups]:
            assert len(group) == min(examples, n)
            if n >= examples:
                for mine, low, high in zip(np.sort(targets[group]), edges, edges[1:], strict=False):
                    assert levels[low] <= mine <= levels[high - 1]


def test_the_example_of_stratified_runs():
    failed, attempted = doctest.testmod(batches)
    assert (failed, attempted) == (0, 2)


@pytest.mark.parametrize(("examples", "counts"), [(5, [2, 2, 1]), (None, [4, 4, 2])])
def test_every_group_has_a_classifiers_labels_in_their_proportion(examples, counts):
    """20, 20 and 10 rows in random order whose answers, all of three tokens, differ in the second."""
    labels = np.random.default_rng(2).permutation(np.repeat([7, 8, 9], [20, 20, 10]))
    split = Encoded.of(
        [([i, 4, int(n), 5], [False, True, True, True]) for i, n in enumerate(labels)]
    )
    cut = ValidationGroups(
        [TaskData("a", split, split)], 5, 0, Layout(1, 0, 64, 257), examples and [examples]
    )
    for group in range(5):
        assert np.unique(labels[cut.rows(group)[0]], return_counts=True)[1].tolist() == counts


def planned(sizes: list[int], positions: int = 9, **changes: str) -> tuple[ValidationGroups, int]:
    """The cut of tasks with so many validation rows each, and the steps between probes, as a configuration has it.

    Rows have 9 positions, those of the first task `positions`.
    """
    tasks = []
    for k, n in enumerate(sizes):
        split = Encoded.of(
            [(range(1 + (9 if k else positions)), [False] + [True] * (9 if k else positions))] * n
        )
        tasks.append(TaskData(f"t{k}", split, split))
    named = ", ".join(f"t{k}: {{train: x, validation: x, format: text}}" for k in range(len(sizes)))
    text = f"model: {{name: x}}\ntasks: {{{named}}}\ntrain: {{steps: 1}}\noutput: x\nbatch: {{examples: 16}}"
    config = parse(text, overrides=[f"{key}={value}" for key, value in changes.items()])
    cut = plan.validation_groups_for(config, tasks, Layout(1, 0, 64, 257))
    return cut, plan.probe_every(config, cut)


def test_a_probe_reads_a_quarter_more_rows_than_a_batch_has_where_there_are_enough():
    def sizes(cut: ValidationGroups) -> list[list[int]]:
        return [[len(rows) for rows in cut.rows(group)] for group in range(cut.groups)]

    lora = {"model.lora": "{r: 2, alpha: 2, target_modules: all-linear}"}
    cut, every = planned([300, 90, 84])
    assert sizes(cut) == [[7, 7, 7]] * 12 and every == 5
    assert planned([300, 90, 84], **lora)[1] == 9
    # Four times as long as the others, whose mean it doubles: n = 20 / 3 * sqrt(2 / 4), and for the others 20 / 3 * sqrt(2).
    cut, every = planned([300, 300, 300], positions=36)
    assert sizes(cut) == [[5, 9, 9]] * 12 and every == 5
    cut, every = planned([300, 40, 9])  # 12 groups of at least 4 are not to be had
    assert sizes(cut) == [[7, 4, 4]] * 2 and every == 5
    cut, every = planned([60] * 40)  # 4 of each are as many as ten batches have
    assert sizes(cut) == [[4] * 40] * 12 and every == round(5 * 160 / 24) == 33
    assert planned([60] * 40, **lora)[1] == 60
    cut, every = planned([30, 30], **{"evaluate.probe": "{examples: 2, every: 3, groups: 4}"})
    assert sizes(cut) == [[2, 2]] * 4 and every == 3
    cut, every = planned([36, 36], **{"evaluate.probe": "{examples: all}"})
    assert sizes(cut) == [[3, 3]] * 12 and every == 5


def test_the_cut_follows_the_seed():
    tasks = toy_tasks({"a": 30, "b": 30})
    first, same, other = (
        ValidationGroups(tasks, 3, seed, Layout(1, 0, 64, 257), [4, 4]) for seed in (0, 0, 1)
    )
    for part in range(first.parts):
        for k in range(2):
            assert first.rows(part)[k].tolist() == same.rows(part)[k].tolist()
    assert any(first.rows(0)[k].tolist() != other.rows(0)[k].tolist() for k in range(2))


def test_encoded_in_memory():
    split = Encoded.of([([1, 2, 3], [False, True, False]), ([4, 5], [False, True])], name="here")
    assert len(split) == 2 and split.lengths.tolist() == [3, 2] and split.targets.tolist() == [1, 1]
    assert split.answers.tolist() == [2 << 42, 5 << 42]
    assert split.ids(1).tolist() == [4, 5] and split.ids(1).dtype == np.int32
    assert split.target(0).tolist() == [False, True, False] and split.target(0).dtype == np.bool_
    assert split.where(1) == "here, row 2"
    assert split.problems() == ["2 of 2 rows kept: 5 tokens, 2 of them targets"]
    with pytest.raises(IndexError):
        split.ids(2)


def test_where_there_is_an_accelerator_its_device_is_set_and_steps_are_pinned(monkeypatch):
    """By stand-ins: no test runs where memory can be pinned."""
    seen = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    note = lambda what: seen.append((threading.current_thread().name.partition("_")[0], what))  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "set_device_index", note)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: note("pin") or tensor.clone())
    tasks = toy_tasks({"a": 6})
    batches = TrainBatches(tasks, Mix(["a"], [6], [6], 2, 0), Layout(1, 0, 64, 257), ahead=0)
    (micro,) = batches.batch(0)
    batches.close()
    assert seen == [("batches", 3)] + [("batches", "pin")] * 6, (
        "input_ids, position_ids, attention_mask, at, labels, task"
    )
    monkeypatch.undo()
    plain = TrainBatches(tasks, Mix(["a"], [6], [6], 2, 0), Layout(1, 0, 64, 257), ahead=0)
    for field in ("input_ids", "position_ids", "attention_mask", "at", "labels", "task"):
        assert torch.equal(getattr(micro, field), getattr(plain.batch(0)[0], field))
    plain.close()
