"""Ways to break each invariant of ARCHITECTURE.md on purpose, and the test that notices: docs/mutations.md.

``tests/mutate.py`` tries them, ``tests/unit/test_mutations.py`` keeps them fitting the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mutation:
    """One way to break an invariant.

    Attributes:
        invariant: its number in ARCHITECTURE.md.
        what: what is broken, in words.
        path: of the file, below the root.
        old: what stands there exactly once.
        new: what is put in its place.
        test: what notices, as pytest takes it; the invariant names it, or its file.
    """

    invariant: int
    what: str
    path: str
    old: str
    new: str
    test: str

    def row(self) -> str:
        """The line of docs/mutations.md."""
        return f"| {self.invariant} | {self.what} (`{self.path}`) | `{self.test}` |"

    def apply(self, root: Path) -> str:
        """Break the copy in ``root``; the file's text of before."""
        before = (root / self.path).read_text()
        assert before.count(self.old) == 1, f"{self.path}: {before.count(self.old)} times {self.old!r}"
        (root / self.path).write_text(before.replace(self.old, self.new))
        return before


MUTATIONS = (
    Mutation(
        1,
        "files get their names before they are synced",
        "ciuic_async/stores/local.py",
        "                self._fsync(file.fileno(), file.name)\n",
        "                file.fileno()\n",
        "tests/crash/test_power_loss.py::test_what_was_durable_survives_a_power_cut_at_any_moment",
    ),
    Mutation(
        1,
        "folders are not synced after names were put into them",
        "ciuic_async/stores/local.py",
        "                self._fsync(folder, folder_name)\n",
        "                pass\n",
        "tests/crash/test_power_loss.py::test_what_was_durable_survives_a_power_cut_at_any_moment",
    ),
    Mutation(
        1,
        "a folder that a dead process made is taken for durable",
        "ciuic_async/stores/local.py",
        "if create and (made or path not in self._durable_folders):",
        "if create and made:",
        "tests/crash/test_power_loss.py::test_what_a_killed_process_left_unsynced_is_synced_by_the_next",
    ),
    Mutation(
        1,
        "the slot is claimed before anything is published",
        "ciuic_async/pipeline/commit.py",
        "    claiming = False\n    try:\n        _publish(store, list(written.files), published)\n",
        "    claiming = False\n    try:\n"
        "        index = target.log.append(lambda log: [entry], target.key, announce=target.announce)\n"
        "        _publish(store, list(written.files), published)\n"
        "        where_file = (layout.locator(where.snapshot, where.generation), where.encode())\n"
        "        _publish(store, _filled(store, [*encoded.parts, encoded.root, where_file]), published)\n"
        "        return index\n",
        "tests/crash/test_power_loss.py::test_what_was_durable_survives_a_power_cut_at_any_moment",
    ),
    Mutation(
        2,
        "manifest and locator are published before segments",
        "ciuic_async/pipeline/commit.py",
        "        _publish(store, list(written.files), published)\n        files = [*encoded.parts, encoded.root, "
        "(layout.locator(where.snapshot, where.generation), where.encode())]\n"
        "        _publish(store, _filled(store, files), published)\n",
        "        files = [*encoded.parts, encoded.root, "
        "(layout.locator(where.snapshot, where.generation), where.encode())]\n"
        "        _publish(store, _filled(store, files), published)\n"
        "        _publish(store, list(written.files), published)\n",
        "tests/unit/test_persist.py::test_each_kind_of_file_is_published_before_the_next",
    ),
    Mutation(
        2,
        "the log head is written before its tiles",
        "ciuic_async/transparency/log.py",
        "                whole = self._damaged\n                self._files.publish(",
        "                whole = self._damaged\n                self._publish_head(key)\n"
        "                self._files.publish(",
        "tests/unit/test_persist.py::test_each_kind_of_file_is_published_before_the_next",
    ),
    Mutation(
        2,
        "another module publishes a snapshot's segments",
        "ciuic_async/pipeline/persist.py",
        "            written = writer.finish()\n",
        "            written = writer.finish()\n            self._target.store.publish(list(written.files))\n",
        "tests/conventions/test_sources.py::test_only_the_commit_publishes",
    ),
    Mutation(
        2,
        "a damaged tile is not made again",
        "ciuic_async/transparency/tile_files.py",
        "        self._store.overwrite(name, data)\n",
        "        return\n",
        "tests/unit/test_log.py::test_every_derived_file_may_be_damaged_or_missing",
    ),
    Mutation(
        3,
        "a failed fsync is tried again",
        "ciuic_async/stores/local.py",
        "        try:\n            os.fsync(descriptor)\n        except OSError as error:\n            number",
        "        with suppress(OSError):\n            return os.fsync(descriptor)\n"
        "        try:\n            os.fsync(descriptor)\n        except OSError as error:\n            number",
        "tests/unit/test_local_store.py::test_a_failed_fsync_is_final",
    ),
    Mutation(
        3,
        "a slot whose fsync failed counts as won when it reads back",
        "ciuic_async/transparency/ordering.py",
        '            if error.kind == "fsync_failed":\n                raise\n',
        "",
        "tests/crash/test_every_syscall.py::test_a_failed_fsync_of_the_commit_is_never_reported_durable",
    ),
    Mutation(
        4,
        "create replaces what has the name",
        "ciuic_async/stores/local.py",
        "        if replace:\n            os.rename",
        "        if True:\n            os.rename",
        "tests/contracts/test_store_contract.py::test_create_once",
    ),
    Mutation(
        4,
        "segments that living snapshots refer to are deleted with their writer",
        "ciuic_async/retention/collect.py",
        "if name not in needed}",
        "if name}",
        "tests/unit/test_retention.py::test_pruned_snapshots_go_and_living_ones_stay_whole",
    ),
    Mutation(
        4,
        "files go before the prune entry is claimed",
        "ciuic_async/retention/collect.py",
        "    target.append(entries)\n"
        "    garbage = _garbage(store, log, counted_from=newest if claimed else {})\n"
        "    _sweep(store, garbage)\n",
        "    garbage = _garbage(store, log, counted_from=newest, also_pruned=decision.dropped)\n"
        "    _sweep(store, garbage)\n"
        "    target.append(entries)\n",
        "tests/crash/test_every_syscall.py::test_a_kill_before_any_change_of_the_disk_loses_nothing",
    ),
    Mutation(
        4,
        "retention runs before the successor is durable",
        "ciuic_async/background.py",
        "        self._look_for_room(job.stats.raw_bytes)\n        try:\n",
        "        if self._keep is not None:\n"
        "            self._chain.prune(type(self._keep)(max(self._keep.count - 1, 1)))\n        try:\n",
        "tests/crash/test_every_syscall.py::test_a_kill_before_any_change_of_the_disk_loses_nothing",
    ),
    Mutation(
        5,
        "staging does not wait for the device's copies",
        "ciuic_async/staging/stager.py",
        "    pending = begin(sources, payload, base, end, devices)\n    try:\n        for work in pending:\n",
        "    pending = begin(sources, payload, base, end, devices)\n    try:\n        for work in pending[:0]:\n",
        "tests/unit/test_staging_order.py::test_staging_sees_what_was_queued_before_and_nothing_after",
    ),
    Mutation(
        5,
        "on a GPU the copies do not wait for what training queued before",
        "ciuic_async/staging/device.py",
        "        self._stream.wait_event(ready)\n",
        "",
        "tests/unit/test_staging_order.py::test_the_gate_of_a_gpu_makes_the_stream_wait_and_not_the_host",
    ),
    Mutation(
        5,
        "the optimizer's step does not wait at the gate",
        "ciuic_async/staging/gate.py",
        "            self._seen[id(optimizer)] = weakref.ref(optimizer)\n        self._finish()\n",
        "            self._seen[id(optimizer)] = weakref.ref(optimizer)\n",
        "tests/unit/test_overlap.py::test_every_snapshot_is_of_its_step",
    ),
    Mutation(
        5,
        "on a GPU the gate does not order training behind the copies",
        "ciuic_async/overlap.py",
        "complete = [work.order() for work in flight.works]",
        "complete = [False for work in flight.works]",
        "tests/unit/test_staging_order.py::test_the_gate_orders_training_behind_the_copies",
    ),
    Mutation(
        5,
        "an optimizer counts as seen though it made no step since",
        "ciuic_async/staging/gate.py",
        "        seen, self._seen = self._seen, {}\n",
        "        seen = self._seen\n",
        "tests/unit/test_overlap.py::test_without_a_step_of_the_optimizer_everything_is_copied_at_once",
    ),
    Mutation(
        5,
        "blocking staging only begins the copy and returns",
        "ciuic_async/pipeline/capture_stage.py",
        "            if copy is None:\n                stage(*what)\n            if digester is not None:\n",
        "            begin(*what, in_background=True)\n            if False:\n",
        "tests/unit/test_persist.py::test_training_may_change_everything_as_soon_as_save_returns",
    ),
    Mutation(
        5,
        "memory that a buffer shares with a parameter is copied later",
        "ciuic_async/taking.py",
        "        return held - training.storages_of_others(self._state, watch.tensors)\n",
        "        return held\n",
        "tests/unit/test_overlap.py::test_memory_shared_with_a_buffer_is_copied_at_once",
    ),
    Mutation(
        6,
        "counters of in-place changes are not compared",
        "ciuic_async/staging/gate.py",
        "                if alias._version != record.version:\n",
        "                if alias._version < record.version:\n",
        "tests/unit/test_gate.py::test_changed_bytes_are_found",
    ),
    Mutation(
        6,
        "a torn snapshot is handed to the writer",
        "ciuic_async/overlap.py",
        "        if reason is None:\n            self._hand_on(flight)\n        else:\n",
        "        if flight.landed or reason:\n            flight.landed = True\n            self._hand_on(flight)\n"
        "        else:\n",
        "tests/properties/test_torn.py::test_no_snapshot_is_torn",
    ),
    Mutation(
        6,
        "a torn snapshot is dropped and not taken again",
        "ciuic_async/overlap.py",
        "        self._torn = Torn(flight.job, reason)\n",
        "",
        "tests/unit/test_overlap.py::test_a_torn_snapshot_is_taken_again_at_the_next_step",
    ),
    Mutation(
        6,
        "what no counter tells of is not copied again",
        "ciuic_async/taking.py",
        "        remembered = self._writer.frozen.known(captured.plan)\n",
        "        remembered = self._writer.frozen.known(captured.plan)\n"
        "        modules = [o for o in self._state.values() if isinstance(o, torch.nn.Module)]\n"
        "        counters = [p._version for m in modules for p in m.parameters()]\n"
        "        kept, before = self._writer._kept, getattr(self, 'counters', None)\n"
        "        self.counters = counters\n"
        "        if kept and counters == before and kept.plan.memo is captured.plan.memo and all(kept.digests):\n"
        "            remembered = dict(enumerate(kept.digests))\n",
        "tests/properties/test_torn.py::test_invisible_writers_are_safe_with_blocking_staging",
    ),
    Mutation(
        7,
        "addresses are remembered from the last snapshot of the same structure",
        "ciuic_async/capture/plan_cache.py",
        "        pointers = np.append(addresses, 0)[memory.row_leaves] + rows.lows\n",
        "        addresses = globals().setdefault('seen', {}).setdefault(id(self._remembered), addresses)\n"
        "        pointers = np.append(addresses, 0)[memory.row_leaves] + rows.lows\n",
        "tests/unit/test_persist.py::test_storages_may_be_replaced_between_snapshots",
    ),
    Mutation(
        7,
        "the remembered plan keeps the storages it was made of",
        "ciuic_async/capture/plan_cache.py",
        "            rows=replace(sources, owners=(), owner_numbers=nothing, pointers=nothing),\n",
        "            rows=sources,\n",
        "tests/unit/test_plan_cache.py::test_nothing_of_the_state_is_kept_alive",
    ),
    Mutation(
        7,
        "the checkpointer keeps the captured tensors until the next snapshot",
        "ciuic_async/taking.py",
        "            captured = captured.without(remembered)\n",
        "            captured = captured.without(remembered)\n        self.captured = captured\n",
        "tests/unit/test_checkpointer.py::test_the_checkpointer_keeps_no_state_alive",
    ),
    Mutation(
        8,
        "a chunk's digest is not checked",
        "ciuic_async/segments/reader.py",
        "        if self._verify and blake3_256(raw) != request.digest:\n",
        "        if self._verify and len(blake3_256(raw)) != len(request.digest):\n",
        "tests/hostile/test_flip_every_bit.py::test_every_flipped_bit_is_found_and_never_loaded",
    ),
    Mutation(
        8,
        "a manifest's SHA-256 is not checked",
        "ciuic_async/pipeline/commit.py",
        "    if len(data) != reference.size_bytes or sha256(data).digest() != reference.sha256:\n",
        "    if len(data) != reference.size_bytes:\n",
        "tests/hostile/test_flip_every_bit.py::test_every_flipped_bit_is_found_and_never_loaded",
    ),
    Mutation(
        8,
        "live tensors are filled without looking at digests",
        "ciuic_async/pipeline/restore.py",
        "    read_tensors(store, resolved, targets, listener=listener)\n",
        "    read_tensors(store, resolved, targets, verify=False, listener=listener)\n",
        "tests/unit/test_restore.py::test_damage_never_reaches_a_live_model",
    ),
    Mutation(
        8,
        "restore gives up at the first damaged snapshot",
        "ciuic_async/resuming.py",
        "            except (IntegrityError, StoreError) as error:\n",
        "            except StoreError as error:\n",
        "tests/unit/test_restore.py::test_latest_falls_back_over_damage",
    ),
    Mutation(
        8,
        "a head that disagrees with the slots is no fork",
        "ciuic_async/transparency/log.py",
        "        if self._read(lambda view: view.root_at(head.size)) != head.root:\n"
        "            raise self._fork(head.size, self._view.head.size)\n",
        "",
        "tests/unit/test_log.py::test_two_signed_histories_are_a_fork",
    ),
    Mutation(
        8,
        "restore passes over a fork",
        "ciuic_async/chain.py",
        "        self._refresh()\n        return (self.snapshot(line) for line in the_line(self._log))\n",
        "        try:\n            self._refresh()\n        except Exception:\n            pass\n"
        "        return (self.snapshot(line) for line in the_line(self._log))\n",
        "tests/unit/test_restore.py::test_latest_never_falls_back_over_a_fork_or_a_forgery",
    ),
    Mutation(
        9,
        "pickle is imported",
        "ciuic_async/capture/values.py",
        "import operator\n",
        "import operator\nimport pickle\n",
        "tests/conventions/test_sources.py::test_nothing_stored_is_ever_executed",
    ),
    Mutation(
        9,
        "the module that a file names is imported",
        "ciuic_async/capture/values.py",
        "    module = sys.modules.get(module_name)\n",
        "    import importlib\n    module = importlib.import_module(module_name)\n",
        "tests/unit/test_capture_values.py::test_an_enum_is_not_imported",
    ),
    Mutation(
        9,
        "what is unknown is stored as its repr",
        "ciuic_async/capture/values.py",
        '        return {"numpy.dtype": value.str}\n    return NOT_PLAIN\n',
        '        return {"numpy.dtype": value.str}\n'
        "    known = (dict, list, tuple, set, frozenset, collections.deque, np.ndarray, torch.Tensor)\n"
        "    return NOT_PLAIN if isinstance(value, known) else repr(value)\n",
        "tests/unit/test_capture_values.py::test_what_is_unknown_is_refused_by_path_and_type",
    ),
    Mutation(
        9,
        "unknown fields of a node are ignored",
        "ciuic_async/capture/values.py",
        "    if set(node) != keys:\n",
        "    if not keys <= set(node):\n",
        "tests/hostile/test_nodes.py::test_a_malformed_node_is_refused",
    ),
    Mutation(
        10,
        "a state above the bound is staged whole",
        "ciuic_async/staging/budget.py",
        "    if bound >= needed:\n",
        "    if bound >= 0:\n",
        "tests/unit/test_windows.py::test_peak_memory_is_bounded",
    ),
    Mutation(
        10,
        "slots are made without number",
        "ciuic_async/staging/slots.py",
        "        if len(self._slots) - len(self._free) >= plan.count:\n            return None\n"
        "        size = align_up(plan.size_bytes, PAGE_BYTES)\n        bound = plan.count * size\n",
        "        size = align_up(plan.size_bytes, PAGE_BYTES)\n        bound = 99 * size\n",
        "tests/unit/test_checkpointer.py::test_waiting_is_bounded_and_loud",
    ),
    Mutation(
        10,
        "asking for a file's size leaks its descriptor",
        "ciuic_async/stores/local.py",
        "                descriptor, size = self._open_file(name)\n                _close(descriptor)\n",
        "                descriptor, size = self._open_file(name)\n",
        "tests/unit/test_checkpointer.py::test_memory_and_descriptors_stay_flat",
    ),
    Mutation(
        10,
        "encoding runs ahead of the disk without bound",
        "ciuic_async/pipeline/workers.py",
        "                if len(ahead) > 2 * self._count:\n",
        "                if len(ahead) > 2000 * self._count:\n",
        "tests/unit/test_workers.py::test_work_ahead_is_bounded",
    ),
    Mutation(
        10,
        "lost races are run again without end",
        "ciuic_async/transparency/log.py",
        "        for attempt in range(attempts):\n",
        "        for attempt in range(attempts + 1):\n",
        "tests/unit/test_log.py::test_a_lost_race_builds_again_and_ends",
    ),
    Mutation(
        11,
        "a failure is told at every step",
        "ciuic_async/checkpointer.py",
        "        self._unfinished = deque(pending for pending in self._unfinished if pending not in finished)\n"
        "        return [failure for pending in finished if (failure := pending.take_unseen_error()) is not None]\n",
        "        return [pending._failure() for pending in finished if pending.phase == FAILED]\n",
        "tests/unit/test_checkpointer.py::test_a_failure_warns_once_and_training_goes_on",
    ),
    Mutation(
        11,
        "a failure is told to nobody",
        "ciuic_async/pending.py",
        "            if self.phase != FAILED or self._error_seen:\n",
        "            if self.phase != STAGED or self._error_seen:\n",
        "tests/unit/test_checkpointer.py::test_a_failure_warns_once_and_training_goes_on",
    ),
    Mutation(
        11,
        "a failure stops training unasked",
        "ciuic_async/checkpointer.py",
        "            if not self._raises:\n",
        "            if self._raises:\n",
        "tests/unit/test_checkpointer.py::test_a_failure_warns_once_and_training_goes_on",
    ),
    Mutation(
        12,
        "a staged snapshot says that it is durable",
        "ciuic_async/pending.py",
        "                self.phase = STAGED\n",
        "                self.phase = DURABLE\n",
        "tests/unit/test_pending.py::test_phases_of_a_snapshot",
    ),
    Mutation(
        12,
        "waiting for durable ends when it is staged",
        "ciuic_async/pending.py",
        "        self._wait((DURABLE, FAILED), timeout_s)\n",
        "        self._wait((STAGED, DURABLE, FAILED), timeout_s)\n",
        "tests/unit/test_pending.py::test_phases_of_a_snapshot",
    ),
    Mutation(
        12,
        "durable is reported before the commit",
        "ciuic_async/pipeline/persist.py",
        "            index = commit(self._target, about.encoded, written, where, data, ensure)\n",
        "            import threading\n"
        "            index = self._target.log.head.size\n"
        "            threading.Timer(\n"
        "                0.3, commit, (self._target, about.encoded, written, where, data, ensure)\n"
        "            ).start()\n",
        "tests/crash/test_power_loss.py::test_what_was_durable_survives_a_power_cut_at_any_moment",
    ),
    Mutation(
        13,
        "a parent that was pruned before the claim is leaned on",
        "ciuic_async/pipeline/rewrite.py",
        "        if is_live(self._target.log, self._parent.snapshot):\n",
        "        if is_live is not None:\n",
        "tests/unit/test_persist.py::test_a_parent_that_is_pruned_just_before_the_claim_is_not_leaned_on",
    ),
    Mutation(
        13,
        "a delta to a pruned parent is kept",
        "ciuic_async/pipeline/rewrite.py",
        "            if place.depth or layout.owner(place.segment.path) != self._snapshot\n",
        "            if layout.owner(place.segment.path) != self._snapshot\n",
        "tests/unit/test_persist.py::test_a_delta_to_a_parent_that_is_pruned_is_written_whole",
    ),
    Mutation(
        13,
        "the depth of a delta is not counted",
        "ciuic_async/codecs/planes.py",
        "        base.depth + 1,\n",
        "        1,\n",
        "tests/unit/test_delta_chain.py::test_small_changes_are_stored_as_deltas_of_bounded_depth",
    ),
    Mutation(
        13,
        "gc takes the files of a writer at work",
        "ciuic_async/retention/collect.py",
        "now - file.modified_s >= orphan_age_s}\n",
        "now - file.modified_s >= -orphan_age_s}\n",
        "tests/unit/test_retention.py::test_gc_spares_young_orphans_and_sweeps_old_ones",
    ),
    Mutation(
        13,
        "a snapshot whose segments vanished is claimed",
        "ciuic_async/pipeline/commit.py",
        "            _check_segments(store, current)\n",
        "",
        "tests/unit/test_commit.py::test_a_segment_that_is_gone_before_the_claim_fails_the_snapshot",
    ),
    Mutation(
        13,
        "chunks of the parent are referenced though their segments are gone",
        "ciuic_async/pipeline/persist.py",
        "        gone = {segment for segment in segments if store.size(segment.path) != segment.size_bytes}\n",
        "        gone = {segment for segment in segments if store.size(segment.path) == -1}\n",
        "tests/unit/test_delta_chain.py::test_a_lost_base_costs_no_further_snapshot",
    ),
    Mutation(
        13,
        "retention takes the bases of living deltas",
        "ciuic_async/retention/collect.py",
        "    return {segment.path for one in found for segment in one.segments()}\n",
        "    return {place.segment.path for one in found for place in one.chunks.values()}\n",
        "tests/unit/test_delta_chain.py::test_bases_of_pruned_snapshots_stay",
    ),
    Mutation(
        14,
        "a rollback to what was pruned before it is followed",
        "ciuic_async/pipeline/history.py",
        "                if entry.snapshot in pruned_since:",
        "                if False:",
        "tests/unit/test_history.py::test_the_line_follows_every_rollback",
    ),
    Mutation(
        14,
        "a policy can drop the latest",
        "ciuic_async/retention/collect.py",
        "    for entry in entries[-1:]:",
        "    for entry in entries[:0]:",
        "tests/unit/test_history.py::test_the_latest_is_never_pruned",
    ),
    Mutation(
        14,
        "a log is not compared with the pin",
        "ciuic_async/chain.py",
        "        self._pins.check(self.origin, self._log, lambda:",
        "        (lambda *_: None)(self.origin, self._log, lambda:",
        "tests/chain/test_attacks_trust.py::test_a_pin_tells",
    ),
    Mutation(
        14,
        "a witness signs whatever a log signed",
        "ciuic_async/transparency/witness.py",
        "            proof.check_consistency(last.size, request.head.size, last.root, request.head.root, request.path)",
        "            pass",
        "tests/unit/test_witness.py::test_what_does_not_extend_the_last_head_is_422",
    ),
)
