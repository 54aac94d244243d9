"""From scores to one reward, and the weights that a person types.

* [E2] R is the weighted mean of the scores, and only the weights' proportions count.
* Weights are read as they are typed; axes that are not named keep 1.
* Weights that make no sense are refused in one line.
"""

import pytest
import torch

from plumbing.files import UserError
from reward_model import combine, parse_weights

AXES = ["politeness", "safety"]


def test_reward_is_the_weighted_mean_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.4, 1.0]], dtype=torch.float64)
    weights = torch.tensor([2.0, 1.0, 5.0], dtype=torch.float64)
    wanted = [(2 * 0.9 + 0.5 + 5 * 0.1) / 8, (2 * 0.2 + 0.4 + 5 * 1.0) / 8]
    assert combine(scores, weights).tolist() == pytest.approx(wanted, abs=1e-15)
    # Only proportions count, so that --lr keeps its meaning when weights change.
    torch.testing.assert_close(combine(scores, 7 * weights), combine(scores, weights))
    # An axis of weight 0 is out, whatever it says.
    other = scores.clone()
    other[:, 1] = 100.0
    weights[1] = 0
    assert torch.equal(combine(other, weights), combine(scores, weights))


@pytest.mark.parametrize(("text", "wanted"), [
    ("", [1, 1]), ("safety=2", [1, 2]), (" safety=0.5 , politeness=0 ", [0, 0.5]),
    ("safety=1e-3,", [1, 1e-3])])
def test_weights_are_read_and_unnamed_axes_keep_1(text, wanted):
    assert parse_weights(text, AXES).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(("text", "message"), [
    ("wisdom=1", "unknown axis 'wisdom'.*politeness, safety"),
    ("safety=-1", "must not be negative"), ("safety=nan", "must not be negative"),
    ("safety=inf", "must not be negative"), ("safety=lots", "not axis=number"),
    ("safety", "not axis=number"), ("safety=", "not axis=number"),
    ("=2", "unknown axis"), ("safety=0,politeness=0", "all weights are 0"),
    ("safety=1,politeness=2,safety=1", "names safety twice"),
    # Neither survives fp32: a sum of 0 or inf would make every reward NaN.
    ("safety=1e-60,politeness=1e-60", "weights"), ("safety=1e60", "weights")])
def test_bad_weights_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_weights(text, AXES)
