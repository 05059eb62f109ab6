import pytest
import torch

from actors.rows import PromptGroup, attention_mask, group_row, split_responses

EXAMPLE = PromptGroup(prompt_ids=[5, 6], responses=[[7, 8], [9]])


def test_a_shared_row_by_hand():
    row = group_row([EXAMPLE])
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert row.segments.tolist() == [[0, 0, 1, 1, 2]]
    assert row.kept[row.states].tolist() == [1, 2, 3, 1, 4]
    assert row.kept.tolist() == [1, 2, 3, 4]  # the prompt's last state is computed once
    assert row.token_states.tolist() == [0, 1, 3]
    assert row.targets.tolist() == [7, 8, 9]
    assert row.lengths == (2, 1)


def test_a_shared_mask_by_hand():
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # the second response does not see the first
    ]
    assert attention_mask(group_row([EXAMPLE]))[0, 0].int().tolist() == expected


def test_a_window_counts_positions_not_indices():
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],  # position 2 still sees position 1, three places to the left
    ]
    assert attention_mask(group_row([EXAMPLE]), window=2)[0, 0].int().tolist() == expected


def test_groups_in_one_row_do_not_see_each_other():
    row = group_row([EXAMPLE, PromptGroup(prompt_ids=[4], responses=[[3]])])
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    allowed = attention_mask(row)[0, 0]
    assert not allowed[5:, :5].any()
    assert allowed[6].int().tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_padded_rows_by_hand():
    row = group_row([EXAMPLE, PromptGroup(prompt_ids=[4], responses=[[3]])], layout="padded")
    assert row.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0], [4, 3, 0, 0]]
    assert (row.groups >= 0).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert row.kept.tolist() == [0, 1, 2, 3]
    assert row.states.tolist() == [1, 2, 3, 5, 6, 8, 9]
    assert row.token_states.tolist() == [0, 1, 3, 5]
    assert row.targets.tolist() == [7, 8, 9, 3]


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_states_hold_the_token_before_each_target_and_the_last_one(layout):
    groups = [EXAMPLE, PromptGroup(prompt_ids=[4, 4, 4], responses=[[3, 2, 1], [8]])]
    row = group_row(groups, layout=layout)
    ids = row.input_ids[:, row.kept].flatten()[row.states]
    expected = [token for g in groups for r in g.responses for token in (g.prompt_ids[-1], *r)]
    assert ids.tolist() == expected
    pieces = split_responses(ids, [length + 1 for length in row.lengths])
    assert [piece.tolist()[1:] for piece in pieces] == [list(r) for g in groups for r in g.responses]


def test_empty_prompts_and_responses_are_refused():
    for groups in ([], [PromptGroup(prompt_ids=[], responses=[[1]])], [PromptGroup(prompt_ids=[1], responses=[])]):
        with pytest.raises(ValueError, match="at least one group"):
            group_row(groups)
    with pytest.raises(ValueError, match="at least one token"):
        group_row([PromptGroup(prompt_ids=[1], responses=[[1], []])])


def test_a_row_moves_whole():
    moved = group_row([EXAMPLE]).to(torch.device("meta"))
    assert {moved.input_ids.device.type, moved.states.device.type, moved.targets.device.type} == {"meta"}
    assert moved.lengths == (2, 1)
