"""Where configs and headers come from: folders and a Hub, here a real HTTP server on this machine."""

import http.server
import json
import struct
import threading
from pathlib import Path

import pytest

from memory_budget.__main__ import main
from memory_budget.sources.hub import HubModel
from memory_budget.sources.safetensors import sizes_of, tensors_of_folder
from memory_budget.sources.source import open_source

TOKEN = "hf_secret"
UNKNOWN = {"model_type": "strange", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = {"model.embed_tokens.weight": (10, 8), "model.layers.0.q.weight": (8, 8), "model.layers.0.norm.weight": (8,), "experts": (3, 8, 8)}
PARAMETERS = 80 + 64 + 8 + 192


def write_safetensors(path: Path, shapes: dict, dtype: str = "BF16", room: int = 0) -> None:
    """A file of such a header; its weights are `room` zero bytes, which nobody should read."""
    header = json.dumps({"__metadata__": {"format": "pt"}} | {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(room))


def model_folder(folder: Path, *, sharded: bool = False, config: dict = UNKNOWN) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not sharded:
        write_safetensors(folder / "model.safetensors", SHAPES, room=2**20)
        return folder
    halves = [dict(list(SHAPES.items())[:2]), dict(list(SHAPES.items())[2:])]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        write_safetensors(folder / name, half)
    weight_map = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves root/OWNER/NAME/FILE as a Hub does; `elsewhere`: where it sends those who ask for weights."""

    root: Path
    elsewhere: str | None = None
    heeds_ranges = True
    private = False
    seen: list[tuple[str, str | None]]
    sent: int

    def do_GET(self):  # noqa: N802
        type(self).seen.append((self.path, self.headers.get("Authorization")))
        if self.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send_error(401)
        if self.elsewhere and self.path.endswith(".safetensors") and not self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.elsewhere + self.path)
            return self.end_headers()
        file = self.root / self.path.replace("/resolve/main", "").replace("/resolve/v1", "").lstrip("/")
        if not file.is_file():
            return self.send_error(404)
        content, wanted = file.read_bytes(), self.headers.get("Range")
        if wanted and self.heeds_ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
        self.send_response(206 if wanted and self.heeds_ranges else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content)
            type(self).sent += len(content)
        except OSError:  # the reader has what it wants
            pass
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Starts a Hub, and gives its handler; more come of hub.start()."""
    servers = []

    def start(**settings):
        handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "seen": [], "sent": 0, **settings})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        handler.address = f"http://127.0.0.1:{server.server_port}"
        return handler

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("sharded", [False, True])
def test_headers_of_a_folder_give_every_shape_once(sharded, tmp_path):
    tensors = tensors_of_folder(model_folder(tmp_path, sharded=sharded))
    assert {name: shape for name, (_, shape) in tensors.items()} == SHAPES


def test_headers_are_those_that_safetensors_writes(tmp_path):
    torch, save = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").save_file
    save({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert tensors_of_folder(tmp_path) == {"a": ("F32", (3, 4)), "b": ("BF16", (5,))}


NONE_AT_ALL = [b"", b"short", bytes(8), b"\xff" * 20, struct.pack("<Q", 4) + b"[1]]", struct.pack("<Q", 19) + b'{"a": {"dtype": 3}}']


@pytest.mark.parametrize("content", NONE_AT_ALL)
def test_a_file_that_is_no_safetensors_file_is_named(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors must be a safetensors file"):
        tensors_of_folder(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "x.bin", 3])
def test_an_index_names_files_beside_it_alone(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="must name .*safetensors files beside it"):
        tensors_of_folder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    (model_folder(tmp_path, sharded=True) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors cannot be read"):
        tensors_of_folder(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "settings", "numbers"),
    [
        ({"a.weight": ("F8_E4M3", (4, 6)), "a.weight_scale": ("F32", (1,)), "a.weight_scale_inv": ("F32", (1, 1))},
         {"quant_method": "fp8"}, 24),
        ({"a.qweight": ("I32", (2, 6)), "a.scales": ("F16", (1, 6)), "a.qzeros": ("I32", (1, 1)), "a.g_idx": ("I32", (16,))},
         {"quant_method": "gptq", "bits": 4}, 96),
        ({"a.weight_packed": ("I32", (6, 2)), "a.weight_scale": ("BF16", (6, 1)), "a.weight_shape": ("I64", (2,))},
         {"config_groups": {"0": {"weights": {"num_bits": 4}}}}, 96),
        ({"e.up_blocks": ("U8", (3, 4, 2, 16)), "e.up_scales": ("U8", (3, 4, 2)), "e.up_bias": ("BF16", (3, 4))}, {"quant_method": "mxfp4"}, 3 * 4 * 64 + 12),
        ({"a.weight": ("U8", (48, 1)), "a.weight.absmax": ("U8", (2,)), "a.weight.quant_state.bitsandbytes__nf4": ("U8", (80,))}, {"load_in_4bit": True}, 96),
        ({"a.weight": ("BF16", (4, 6)), "a.norm.scale": ("BF16", (4,)), "a.mask": ("BOOL", (9, 9))}, None, 28),
    ],
    ids=["fp8", "gptq", "compressed-tensors", "mxfp4", "bitsandbytes", "plain"],
)  # fmt: skip
def test_packed_weights_count_by_the_numbers_that_they_hold(tensors, settings, numbers):
    sizes, _ = sizes_of(tensors, {"quantization_config": settings} if settings else {})
    assert sum(size.numbers for size in sizes.values()) == numbers


def test_words_of_unknown_packing_are_left_out_and_named():
    sizes, notes = sizes_of({"a.weight": ("I32", (2, 6)), "b.weight": ("BF16", (2,))}, {})
    assert list(sizes) == ["b.weight"] and "1 tensors of whole numbers are not counted, a.weight" in notes[0]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_id_stands_for_a_folder(sharded, hub, tmp_path, monkeypatch, capsys):
    folder = model_folder(tmp_path / "hub" / "owner" / "name", sharded=sharded)
    served = hub()
    monkeypatch.setenv("HF_ENDPOINT", served.address + "/")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    answers = []
    for argument in ("owner/name", "owner/name@v1", str(folder)):
        assert main([argument, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] == answers[2] and answers[0]["parameters"] == PARAMETERS
    assert sorted(tmp_path.rglob("*")) == before and served.sent < 5000, "something was written, or weights were read"


def test_a_server_that_ignores_ranges_is_read_no_further_than_asked(hub, tmp_path, monkeypatch):
    model_folder(tmp_path / "hub" / "owner" / "name")
    monkeypatch.setenv("HF_ENDPOINT", hub(heeds_ranges=False).address)
    assert {name: shape for name, (_, shape) in HubModel("owner/name").tensors().items()} == SHAPES


def test_a_known_types_weights_are_not_asked_for(hub, tmp_path, monkeypatch):
    model_folder(tmp_path / "hub" / "owner" / "name", config={"model_type": "llama"})
    served = hub()
    monkeypatch.setenv("HF_ENDPOINT", served.address)
    assert main(["owner/name", "--json"]) == 0
    assert [path for path, _ in served.seen] == ["/owner/name/resolve/main/config.json"]


def test_the_token_goes_to_the_endpoint_and_not_to_where_it_redirects(hub, tmp_path, monkeypatch):
    model_folder(tmp_path / "hub" / "owner" / "name")
    storage = hub()
    served = hub(private=True, elsewhere=storage.address)
    monkeypatch.setenv("HF_ENDPOINT", served.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\n")
    assert HubModel("owner/name").tensors()
    assert {token for _, token in served.seen} == {f"Bearer {TOKEN}"} and {token for _, token in storage.seen} == {None}


def test_a_redirect_within_the_endpoint_keeps_the_token(hub, tmp_path, monkeypatch):
    model_folder(tmp_path / "hub" / "moved" / "owner" / "name")
    served = hub(private=True, elsewhere="/moved")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", served.address)
    assert HubModel("owner/name").tensors() and {token for _, token in served.seen} == {f"Bearer {TOKEN}"}
    assert {path.startswith("/moved") for path, _ in served.seen} == {True, False}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "owner/name is neither a folder nor a file here, and HF_HUB_OFFLINE is set"),
        ({"TRANSFORMERS_OFFLINE": "yes"}, "TRANSFORMERS_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "127.0.0.1 cannot be reached (Connection refused)"),
        ({"HF_ENDPOINT": "file:///etc"}, "HF_ENDPOINT must be an address that begins with http:// or https://"),
        ({"HF_ENDPOINT": "http://user:hf_secret@127.0.0.1:9"}, "cannot be reached"),
        ({"HF_TOKEN": "hf_secret\x01two"}, "HF_TOKEN must be printable ASCII"),
        ({"HF_TOKEN": "hf_secret"}, "has no config.json on 127.0.0.1, or is not there"),
        ({"private": "1"}, "answers 401: it needs HF_TOKEN"),
        ({"private": "1", "HF_TOKEN": "hf_secret2"}, "answers 401: HF_TOKEN does not give access to it"),
    ],
    ids=str,
)
def test_a_hub_that_cannot_be_asked_is_one_line_without_the_token(environment, says, hub, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub(private="private" in environment).address)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main(["owner/name"])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert says in said.err and "hf_secret" not in said.err


def test_what_is_here_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "owner" / "name")
    assert open_source("owner/name").config == UNKNOWN


@pytest.mark.parametrize("argument", ["/nowhere/config.json", "x.json", "a\0b", "a" * 5000, "no/such/folder"])
def test_what_is_no_hub_id_is_not_asked_for_either(argument, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="config") as found:
        open_source(argument)
    assert "reached" not in str(found.value)
