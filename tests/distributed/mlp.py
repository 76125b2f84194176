"""A generated module, written by hand: loss of an MLP, `down` after `up`, on dp=2, tp=2 (column then row split)."""

from shardc.runtime import Slot, all_gather, all_reduce, reduce_scatter, wait

MESH = {"dp": 2, "tp": 2}
UP, DOWN, X = ((0, 1, "tp"), (1, 1, "dp")), ((1, 1, "tp"),), ((0, 1, "dp"),)
INPUTS = (
    Slot("parameter", "up.weight", 0, (16, 8), "float64", UP),
    Slot("parameter", "down.weight", 0, (8, 16), "float64", DOWN),
    Slot("buffer", "steps", 0, (), "float64", ()),
    Slot("input", "input:0", 0, (4, 8), "float64", X),
)
OUTPUTS = (
    Slot("output", "", 0, (), "float64", ()),
    Slot("output", "", 1, (4, 8), "float64", X),
    Slot("mutation", "steps", 0, (), "float64", ()),
)
TANGENTS = (Slot("tangent", "", 0, (), "float64", ()),)
GRADIENTS = (
    Slot("gradient", "up.weight", 0, (16, 8), "float64", UP),
    Slot("gradient", "down.weight", 0, (8, 16), "float64", DOWN),
)


def forward(up_weight, down_weight, steps, x):
    started = all_gather.start(up_weight, dim=1, axis="dp")  # f64[16@tp, 8]  # up, model.py:1
    up = wait(started)
    h = (x @ up.t()).relu()  # f64[4@dp, 16@tp]                              # model.py:2
    y = all_reduce(h @ down_weight.t(), axis="tp")  # f64[4@dp, 8]           # down, model.py:3
    loss = all_reduce((y * y).sum(), axis="dp")  # f64[]                     # model.py:4
    return (loss, y, steps + 1), (down_weight, x, h, y)


def backward(given):
    down_weight, x, h, y, tangent = given
    given.clear()
    grad_y = 2 * y * tangent
    started_down = all_reduce.start(grad_y.t() @ h, axis="dp")  # f64[8, 16@tp]
    grad_h = (grad_y @ down_weight) * (h > 0)
    started_up = reduce_scatter.start(grad_h.t() @ x, dim=1, axis="dp")  # f64[16@tp, 8@dp]
    return wait(started_up), wait(started_down)
