"""Journal: what was measured survives a cut at any byte, and is found by what it depends on."""

import dataclasses
import json
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import contender, dense

from loki_attn import Budget, Policy
from loki_attn.basis import Basis, LayerBasis
from loki_attn.errors import InputError
from loki_attn.evaluate.agreement import Agreement
from loki_attn.evaluate.journal import Journal, key_of, keys_of
from loki_attn.evaluate.protocol import Contender
from loki_attn.evaluate.task import Item, Record
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki
from loki_attn.testing import layer_shape, tiny_basis

RECORDS = {
    "first": Record(values={"score": [0.25, 1.0]}, decode_calls=3, notes={"answers": ["Grüße\n"]}),
    "second": Record(values={"nll": [0.1 + 0.2], "kl": [5e-324]}, every_query_calls=2),
    "third": Record(
        values={"score": [1.0]}, read_bytes=5, dense_bytes=2**60, notes={"a": {"b": 1}}
    ),
}


def written(path, records=None):
    journal = Journal(path)
    for key, record in (records or RECORDS).items():
        journal.keep(key, record)
    return path.read_bytes()


def found(path, keys=(*RECORDS, "later", "garbage")):
    journal = Journal(path)
    return {key: record for key in keys if (record := journal.find(key)) is not None}


def test_what_is_kept_is_found_again(tmp_path):
    file = tmp_path / "deep" / "er" / "journal.jsonl"
    assert Journal(file).find("first") is None
    assert not file.exists()
    written(file)
    assert found(file) == RECORDS
    assert found(file, ["fourth"]) == {}


def test_without_a_path_it_keeps_in_memory():
    journal = Journal()
    journal.keep("first", RECORDS["first"])
    assert journal.find("first") is RECORDS["first"]
    assert journal.find("second") is None
    assert Journal().find("first") is None


def test_a_record_is_on_disk_before_the_next(tmp_path):
    file, journal = tmp_path / "journal.jsonl", Journal(tmp_path / "journal.jsonl")
    for count, (key, record) in enumerate(RECORDS.items(), 1):
        journal.keep(key, record)
        assert found(file) == dict(list(RECORDS.items())[:count])
        assert file.read_bytes().count(b"\n") == count
        assert file.read_bytes().endswith(b"}\n")


def test_a_cut_at_any_byte_costs_the_cut_record_only(tmp_path):
    """Every length from the end of the first line on; a lost newline costs nothing."""
    file = tmp_path / "journal.jsonl"
    whole = written(file)
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == len(RECORDS)
    for length in range(ends[0], len(whole) + 1):
        file.write_bytes(whole[:length])
        left = {key: RECORDS[key] for key, end in zip(RECORDS, ends, strict=True) if length >= end}
        assert found(file) == left, length
        Journal(file).keep("later", RECORDS["second"])
        assert found(file) == {**left, "later": RECORDS["second"]}, length
        assert file.read_bytes().startswith(whole[:length])


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"not json",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b"7",
        b'"text"',
        b"{}",
        b'{"key": "garbage"}',
        b'{"key": "garbage", "values": {}, "unheard_of": 1}',
        b'{"values": {"score": [1.0]}}',
        b'{"key": ["garbage"], "values": {}}',
        b'{"key": "garbage", "values": {"score": [1.0]',
        b"\r",
    ],
)
def test_lines_of_others_are_passed_over(tmp_path, garbage):
    file = tmp_path / "journal.jsonl"
    whole = written(file)
    for place in (0, whole.index(b"\n") + 1, len(whole)):
        file.write_bytes(whole[:place] + garbage + b"\n" + whole[place:])
        assert found(file) == RECORDS


def test_two_writers_append_to_one_file(tmp_path):
    """Each knows its own records and those it found; a third knows all."""
    file = tmp_path / "journal.jsonl"
    one, other = Journal(file), Journal(file)
    one.keep("first", RECORDS["first"])
    other.keep("second", RECORDS["second"])
    one.keep("third", RECORDS["third"])
    assert found(file) == RECORDS
    assert one.find("second") is None
    assert file.read_bytes().count(b"\n") == 3


def test_the_last_record_of_a_key_counts(tmp_path):
    file = tmp_path / "journal.jsonl"
    journal = Journal(file)
    journal.keep("first", RECORDS["second"])
    journal.keep("first", RECORDS["first"])
    assert journal.find("first") == found(file)["first"] == RECORDS["first"]


@given(values=st.lists(st.floats(allow_nan=False), min_size=1))
def test_numbers_come_back_to_the_last_bit(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    written(file, {"first": Record(values={"score": values})})
    back = found(file)["first"].values["score"]
    assert [struct.pack("d", v) for v in back] == [struct.pack("d", v) for v in values]


def test_not_a_number_comes_back_as_that(tmp_path):
    written(tmp_path / "j", {"first": Record(values={"score": [math.nan]})})
    assert math.isnan(found(tmp_path / "j")["first"].values["score"][0])


@pytest.mark.parametrize(
    ("place", "reason"),
    [("taken/j.jsonl", "(Not a directory|File exists)"), ("", "Is a directory")],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path, place, reason):
    (tmp_path / "taken").touch()
    journal = Journal(tmp_path / place)
    with pytest.raises(InputError, match=rf"Cannot write the journal '.*{place}': {reason}\."):
        journal.keep("first", RECORDS["first"])


POLICY = Policy(select=Loki(rank=4), budget=Budget(top_k=20, sinks=2, recents=3), name="mine")
BASIS = tiny_basis(layer_shape(num_heads=4, head_dim=8), "balanced")
ITEM = Item(name="i", content={"ids": [1, 2, 3], "new_tokens": 4}, labels={"depth": 0.5})
TASK = Agreement(ids=tuple(range(64)), prompts=1, prompt_tokens=32, new_tokens=8)
MODEL = {"id": "tiny", "hash": "abc", "rope": {"theta": 1e4}, "dtype": "float32"}
GIVEN = {
    "task": TASK,
    "model": MODEL,
    "item": ITEM,
    "contender": Contender(name="loki", policy=POLICY, basis=BASIS),
}


def key(**changes):
    return key_of(**{**GIVEN, **changes})


def with_policy(**changes):
    policy = dataclasses.replace(POLICY, **changes)
    return {"contender": Contender(name="loki", policy=policy, basis=BASIS)}


def with_budget(**changes):
    return with_policy(budget=dataclasses.replace(POLICY.budget, **changes))


def with_select(**changes):
    return with_policy(select=dataclasses.replace(POLICY.select, **changes))


def with_basis(**changes):
    layer = BASIS.layers[0]
    maps = {name: changes.pop(name) for name in ("key_map", "query_map") if name in changes}
    layers = {0: dataclasses.replace(layer, **maps)}
    basis = Basis(
        **{"kind": BASIS.kind, "side": BASIS.side, "orthogonal": False, "layers": layers} | changes
    )
    return {"contender": Contender(name="loki", policy=POLICY, basis=basis)}


def nudged(tensor):
    """Equal but for the last bit of one element."""
    changed = tensor.clone()
    changed.view(-1)[5] = torch.nextafter(changed.view(-1)[5], torch.tensor(9.0))
    return changed


CHANGES = {
    "task": {"task": dataclasses.replace(TASK, name="other")},
    "protocol": {"task": dataclasses.replace(TASK, protocol="another way")},
    "model id": {"model": {**MODEL, "id": "other"}},
    "model hash": {"model": {**MODEL, "hash": "abd"}},
    "model rope": {"model": {**MODEL, "rope": {"theta": 1e5}}},
    "model dtype": {"model": {**MODEL, "dtype": "bfloat16"}},
    "item": {"item": dataclasses.replace(ITEM, content={"ids": [1, 2, 4], "new_tokens": 4})},
    "item order": {"item": dataclasses.replace(ITEM, content={"ids": [1, 3, 2], "new_tokens": 4})},
    "item length": {"item": dataclasses.replace(ITEM, content={"ids": [1, 2, 3], "new_tokens": 5})},
    "method": with_policy(select=ExactTopK()),
    "rank": with_select(rank=5),
    "layout": with_select(layout="rotated"),
    "plane": with_select(plane_dtype="int4"),
    "group": with_policy(group_reduce="none"),
    "top_k": with_budget(top_k=21),
    "fraction": with_budget(top_k=None, fraction=0.5),
    "mass": with_budget(top_k=None, mass=0.5),
    "cap": with_budget(top_k=None, mass=0.5, cap=50),
    "sinks": with_budget(sinks=1),
    "recents": with_budget(recents=4),
    "min_k": with_budget(min_k=6),
    "dense_layers": with_budget(dense_layers=(0,)),
    "dense_below": with_budget(dense_below=30),
    "per_layer": with_budget(per_layer=(20, 21)),
    "no basis": {"contender": Contender(name="loki", policy=POLICY)},
    "basis kind": with_basis(kind="mixed"),
    "basis side": with_basis(side="pre"),
    "key map": with_basis(key_map=nudged(BASIS.layers[0].key_map)),
    "query map": with_basis(query_map=nudged(BASIS.layers[0].query_map)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_a_measurement_depends_on_changes_its_key(what):
    assert key(**CHANGES[what]) != key()


def test_no_two_of_these_share_a_key():
    keys = [key(), *(key(**change) for change in CHANGES.values())]
    assert len(set(keys)) == len(keys)


def test_every_field_of_a_budget_is_in_the_list():
    names = {field.name for field in dataclasses.fields(Budget)}
    assert names <= set(CHANGES)


@pytest.mark.parametrize(
    "change",
    [
        {"contender": Contender(name="another label", policy=POLICY, basis=BASIS)},
        with_policy(name="another name"),
        with_basis(),
        {"task": dataclasses.replace(TASK, corpus="renamed", prompts=2, prompt_tokens=16)},
        {"item": dataclasses.replace(ITEM, name="j", labels={})},
        {"item": dataclasses.replace(ITEM, content={"new_tokens": 4, "ids": (1, 2, 3)})},
        {"model": dict(reversed(MODEL.items()))},
    ],
    ids=["label", "name", "same maps", "settings", "item's name", "spelling", "order"],
)
def test_what_a_measurement_does_not_depend_on_leaves_its_key(change):
    assert key(**change) == key()


def test_a_policy_read_back_has_the_same_key():
    again = Contender(name="loki", policy=Policy.from_json(POLICY.to_json()), basis=BASIS)
    assert key(contender=again) == key()


def test_a_basis_read_back_has_the_same_key(tmp_path):
    BASIS.save(tmp_path / "basis.safetensors")
    again = Contender(name="loki", policy=POLICY, basis=Basis.load(tmp_path / "basis.safetensors"))
    assert key(contender=again) == key()


def test_a_key_is_a_sha256_and_plain_text():
    assert len(bytes.fromhex(key())) == 32
    assert json.loads(json.dumps(key())) == key()
    assert key(contender=contender()) != key(contender=dense())


def test_maps_that_swap_their_layers_are_another_basis():
    one, other = (
        tiny_basis(layer_shape(num_heads=4, head_dim=8), seed=s).layers[0] for s in (1, 5)
    )
    assert isinstance(one, LayerBasis)
    keys = {
        key(**with_basis(layers=layers, orthogonal=True, kind="random"))
        for layers in ({0: one, 1: other}, {0: other, 1: one})
    }
    assert len(keys) == 2


def test_the_same_maps_of_another_layer_are_another_basis():
    layer = BASIS.layers[0]
    keys = {key(**with_basis(layers={index: layer})) for index in (0, 1)}
    assert len(keys) == 2


def test_keys_of_many_are_the_keys_of_each():
    items = [Item(name=name, content={"is": name}) for name in "ab"]
    contenders = [contender("one"), dense(), Contender(name="l", policy=POLICY, basis=BASIS)]
    found = keys_of(GIVEN["task"], GIVEN["model"], items, contenders)
    assert found == {
        (item.name, one.name): key(item=item, contender=one) for item in items for one in contenders
    }
    assert len(set(found.values())) == 6
