"""Networks that are written down: plain operations, and one operator for each selective scan.

The operator is private in PyTorch; if its name or arguments change, the first tests here fail.
"""

import pytest
import torch
from torch import nn

from bundle.heads.mean import Classifier
from bundle.networks import compiled, mamba, scan, windows
from bundle.networks.scan import selective_scan, selective_scan_loop

SIZE = {"image_size": (36, 36, 36), "frames": 3, "embed_dim": 4, "depths": (1,), "full_last_stage": False}
SHIFTED = SIZE | {"depths": (2,), "window_size": (4, 4, 4, 2), "first_window_size": (4, 4, 4, 2)}


class Layer(nn.Module):
    """A selective scan, whose steps, input and output weights depend on the input (b, l, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(-torch.rand(5, 16) - 0.1)

    def arguments(self, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return u, u.exp(), self.rates, u[..., :1] + self.rates[0], u[..., 1:2] * self.rates[1], self.rates[:, 2]

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return selective_scan(*self.arguments(u))


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, 5, generator=torch.Generator().manual_seed(length))


def exported(network: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))


def test_a_scan_is_exported_as_one_operator_however_long_it_is():
    layer = Layer().eval()
    counts = []
    for length in (7, 40):
        program = exported(layer, tokens(length))
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert names.count("scan") == 1
        counts.append(len(names))
        for batch in (1, 3):
            u = tokens(length, batch)
            torch.testing.assert_close(program.module()(u), selective_scan_loop(*layer.arguments(u)))
    assert counts[0] == counts[1]


@torch.no_grad()
def test_a_scan_is_one_node_of_onnx():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer = Layer().eval()
    program = torch.onnx.export(exported(layer, tokens(9)), dynamo=True, opset_version=20, verbose=False)
    nodes = [node.op_type for node in program.model_proto.graph.node]
    assert nodes.count("Scan") == 1
    onnx.checker.check_model(program.model_proto)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    u = tokens(9, batch=3)
    (found,) = session.run(None, {session.get_inputs()[0].name: u.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), selective_scan_loop(*layer.arguments(u)))


def test_a_trace_keeps_the_loop_of_a_scan():
    layer = Layer().eval()
    traced = torch.jit.trace(layer, tokens(9), check_trace=False)
    assert str(traced.inlined_graph).count("prim::Loop") == 1
    for length, batch in ((9, 1), (30, 3)):
        u = tokens(length, batch)
        torch.testing.assert_close(traced(u), selective_scan_loop(*layer.arguments(u)))


@pytest.mark.parametrize(
    "options",
    [SIZE, SHIFTED, SHIFTED | {"skip_background": True, "in_channels": 2, "orientation": "LAS"}],
    ids=["plain", "padded and shifted", "with skipped background, two channels and LAS"],
)
@pytest.mark.parametrize("way", ["export", "trace"])
def test_a_network_that_is_written_down_computes_the_same(options: dict, way: str, tmp_path):
    """For any number of clips, and also where gradients are on, as nobody asks for them."""
    network = Classifier(**options, freeze=False).eval()
    images = torch.randn(3, options.get("in_channels", 1), *options["image_size"], options["frames"])
    images[:, :, :25] = 0.5  # background
    if way == "export":
        written = exported(network, images[:2]).module()
    else:
        torch.jit.trace(network, images[:2], check_trace=False).save(tmp_path / "network.ts")
        written = torch.jit.load(tmp_path / "network.ts")
    for some in (images, images[:1]):
        torch.testing.assert_close(written(some), network(some), rtol=1e-5, atol=1e-5)


def test_without_gradients_everything_is_a_plain_operation(monkeypatch: pytest.MonkeyPatch):
    network = Classifier(**SHIFTED).eval()
    image = torch.randn(1, 1, *SIZE["image_size"], 3)
    expected = network(image)

    def refuse(*_: object) -> None:
        raise AssertionError("an autograd function was called")

    for owner, name in ((windows, "_Reorder"), (mamba, "_CausalConv"), (scan, "_SelectiveScan")):
        monkeypatch.setattr(getattr(owner, name), "apply", refuse)
    with torch.no_grad():
        assert torch.equal(network(image), expected)
    with pytest.raises(AssertionError, match="autograd function"):  # where gradients are needed they are as before
        Classifier(**SHIFTED, freeze=False).train()(torch.cat([image, image]))


def test_without_gradients_the_compiled_scan_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    called = []

    def walk(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        called.append(len(tensors))
        return selective_scan_loop(*tensors), torch.empty(0)

    monkeypatch.setattr(compiled, "fits", lambda *_: True)
    monkeypatch.setattr(compiled, "walk", walk)
    layer = Layer().requires_grad_(False)
    torch.testing.assert_close(layer(tokens(9)), selective_scan_loop(*layer.arguments(tokens(9))))
    assert called == [6]


def test_torch_jit_script_cannot_read_these_networks():
    """The model card says so; if it can one day, the card is wrong."""
    with pytest.raises(Exception, match=r"(?s)."):
        torch.jit.script(Classifier(**SIZE))
