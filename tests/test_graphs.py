"""kernels/graphs.py with a graph that is no CUDA graph: it runs the captured function again on the
buffers that it was captured with, which is all that a replay does."""

import threading

import pytest
import torch

from shampoo_kernels.kernels import graphs


class Replayed:
    def __init__(self, function, device):
        self.function, self.device = function, device

    def replay(self):
        self.device.replays += 1
        self.function()


class FakeDevice(graphs.Device):
    def __init__(self):
        super().__init__()
        self.captures = self.replays = 0
        self.stream, self.busy = 0, False

    def key(self, on):
        return on.device, self.stream

    def capturing(self):
        return self.busy

    def capture(self, function, on):
        self.captures += 1
        function()  # the warm-up
        return Replayed(function, self)


def double_(inputs, outputs):
    outputs[0].copy_(2 * inputs[0])
    outputs[1].copy_(inputs[0].sum())


@pytest.fixture
def cache():
    return graphs.Cache(FakeDevice(), most=3)


def call(cache, x, name="double", function=double_):
    outputs = [torch.full_like(x, torch.nan), torch.full((), torch.nan)]
    cache.run(name, function, [x], outputs)
    return outputs


def test_is_captured_once_and_replayed_on_new_numbers(cache):
    for seed in range(4):
        x = torch.full((3, 2), float(seed))
        doubled, total = call(cache, x)
        assert torch.equal(doubled, 2 * x)
        assert total == 6 * seed
    assert (cache.device.captures, cache.device.replays) == (1, 4)


def test_results_are_the_callers_own(cache):
    """A later replay writes the static buffers, not what an earlier call gave."""
    first, _ = call(cache, torch.ones(2))
    second, _ = call(cache, torch.full((2,), 5.0))
    assert first.tolist() == [2, 2]
    assert second.tolist() == [10, 10]


def test_inputs_are_copied_whatever_their_strides(cache):
    wide = torch.arange(12.0).view(3, 4)
    assert torch.equal(call(cache, wide[:, ::2])[0], 2 * wide[:, ::2])
    assert torch.equal(call(cache, wide.T[::2].T)[0], 2 * wide[:, ::2])
    assert torch.equal(call(cache, torch.ones(1, 1).expand(3, 2))[0], torch.full((3, 2), 2.0))
    assert cache.device.captures == 1


def test_what_differs_has_its_own_graph(cache):
    call(cache, torch.ones(2))
    call(cache, torch.ones(3))
    call(cache, torch.ones(2, dtype=torch.float64))
    assert cache.device.captures == 3
    call(cache, torch.ones(2), name="other")
    assert cache.device.captures == 4
    cache.device.stream = 7
    call(cache, torch.ones(2), name="other")
    assert cache.device.captures == 5


def test_the_least_recently_used_is_dropped(cache):
    for n in (1, 2, 3, 1, 4):  # 2 goes when 4 comes
        call(cache, torch.ones(n))
    assert cache.device.captures == 4
    assert len(cache.graphs) == 3
    call(cache, torch.ones(1))
    assert cache.device.captures == 4
    call(cache, torch.ones(2))
    assert cache.device.captures == 5


def test_an_output_may_be_an_input(cache):
    x = torch.ones(2)

    def step(inputs, outputs):
        outputs[0].copy_(inputs[0] + 1)

    for _ in range(3):
        cache.run("step", step, [x], [x])
    assert x.tolist() == [4, 4]  # the warm-up and the capture change nothing of the caller's


def test_a_failed_capture_leaves_nothing_behind(cache):
    def broken(inputs, outputs):
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            call(cache, torch.ones(2), function=broken)
    assert not cache.graphs
    assert torch.equal(call(cache, torch.ones(2))[0], torch.full((2,), 2.0))


def test_threads_take_turns(cache):
    wrong = []

    def work(value):
        for _ in range(50):
            if not (call(cache, torch.full((100,), value))[0] == 2 * value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(k),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.device.captures == 1


def test_only_where_it_is_asked_for(monkeypatch, cache):
    monkeypatch.setattr(graphs, "cache", cache)
    A = torch.ones(1, 2, 2)
    monkeypatch.delenv("SHAMPOO_KERNELS_GRAPHS", raising=False)
    assert not graphs.wanted(A)
    monkeypatch.setenv("SHAMPOO_KERNELS_GRAPHS", "1")
    assert graphs.wanted(A)
    assert not graphs.wanted(A[:0])
    cache.device.busy = True
    assert not graphs.wanted(A)
    cache.device.busy = False
    monkeypatch.setattr(graphs, "_MOST_BYTES", 15)
    assert not graphs.wanted(A)
