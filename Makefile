# Needs python3 (3.11 or newer, with venv) and nothing else; a C++ compiler makes it faster.
#
#   make         the virtual environment .venv, with this package and its native core
#   make demo    train, crash, restore: the package at work; CHAIN=s3://bucket/prefix: there
#   make test    every check: style, types, layers, tests
#   make lint    the checks without the tests
#   make crash   every fault at every operation, 200 random kills, every bit: hours
#   make coverage  the branches that the tests take, package by package: at least 95% or it fails: ten minutes
#   make test-chain  logs of 70,000 entries under other people's verifiers, killed writers: minutes
#   make test-etcd  ordering by a real etcd (apt-get install etcd-server) with killed writers and members: minutes
#   make test-hdfs  chains in HDFS: a real NameNode and DataNode, killed (java, Debian's jersey): minutes, a download once
#   make test-s3    chains on a real object store that fails in all ways, killed servers and writers: minutes
#   make test-ceph  what is promised of a store, by a real Ceph (apt-get install ceph-mon ceph-osd radosgw): minutes
#   make soak    2,000 snapshots with random faults: minutes
#   make fuzz    hostile bytes for every reader, FUZZ_SECONDS (300) each: an hour
#   make mutations  breaks each promise of ARCHITECTURE.md on purpose and asks its tests: ten minutes
#   make sanitize  the native core's own tests under sanitizers: a minute
#   make bench   every measurement in bench/, one file for one question, and a report of them: an hour
#   make clean   remove what was built

PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
BENCH_STAMP := .venv/.bench-installed
FUZZ_STAMP := .venv/.fuzz-installed
FUZZ_SECONDS ?= 300
# Packages whose mistakes would lose or falsify a snapshot.
COVERED := format pipeline segments transparency
# The install is editable: only what decides the environment or the native core asks for a new one.
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*)

.DEFAULT_GOAL := venv
.PHONY: venv demo test lint coverage crash test-chain test-etcd test-s3 test-ceph test-hdfs soak fuzz mutations sanitize bench clean

venv: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: venv
	$(BIN)/ciuic demo $(if $(CHAIN),--chain '$(CHAIN)')

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# What runs in processes that are killed is not counted: the same code runs in these tests too. Three tests are left out:
# they measure time or watch threads change places, and counting branches takes its share of both.
coverage: venv
	mkdir -p build
	COVERAGE_FILE=build/.coverage $(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow" -p no:cacheprovider \
		--deselect tests/unit/test_schedule.py::test_a_step_costs_next_to_nothing \
		--deselect tests/unit/test_native_copy.py::test_releases_the_gil \
		--deselect tests/hostile/test_manifest_bytes.py::test_many_shards_that_a_comparison_of_pairs_would_die_of \
		$(addprefix --cov=ciuic_async/,$(COVERED)) --cov-branch --cov-report=json:build/coverage.json \
		tests/unit tests/hostile tests/properties tests/format tests/contracts tests/equivalence tests/chain tests/services
	$(BIN)/python -m tests.branches build/coverage.json $(COVERED)

crash: venv
	CIUIC_CRASH_LONG=1 CIUIC_KILL_RUNS=20 $(BIN)/python -m pytest $(PYTEST_ARGS) --timeout=14400 \
		tests/crash tests/hostile/test_flip_every_bit.py

# Without the flag these tests run too, for seconds, and are skipped where there is no etcd.
test-etcd: venv
	@command -v etcd >/dev/null || { echo "there is no etcd here; on Debian: apt-get install etcd-server" >&2; exit 1; }
	CIUIC_ETCD_ENTRIES=3000 $(BIN)/python -m pytest $(PYTEST_ARGS) --timeout=1800 tests/services

# Hadoop's jars are part of the source package of pyspark, 220 MB, of which 40 files are kept.
HDFS_JARS := .cache/hdfs/jars
HDFS_KEPT := apacheds api-asn1 api-util avro-1 commons-beanutils commons-cli commons-codec commons-collections \
	commons-configuration commons-digester commons-io commons-lang-2 commons-logging commons-math3 commons-net curator \
	gson guava hadoop-annotations hadoop-auth hadoop-common hadoop-hdfs htrace httpc jackson-core-asl jackson-mapper-asl \
	javax.servlet-api jetty jsr305 leveldbjni log4j-1 netty protobuf-java slf4j xercesImpl xmlenc zookeeper

$(HDFS_JARS)/.unpacked: | $(STAMP)
	mkdir -p $(HDFS_JARS)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary pyspark \
		--dest .cache/hdfs pyspark==2.4.8
	tar -xzf .cache/hdfs/pyspark-2.4.8.tar.gz -C $(HDFS_JARS) --strip-components=3 --wildcards \
		$(HDFS_KEPT:%='*/deps/jars/%*.jar')
	rm .cache/hdfs/pyspark-2.4.8.tar.gz
	touch $@

test-hdfs: $(HDFS_JARS)/.unpacked
	@command -v java >/dev/null && test -e /usr/share/java/jersey1-servlet.jar -a -e /usr/share/java/commons-daemon.jar || \
		{ echo "java, jersey 1 or commons-daemon is missing; on Debian: apt-get install default-jre-headless" \
		"libjersey1-servlet-java libcommons-daemon-java" >&2; exit 1; }
	CIUIC_HDFS_JARS=$(HDFS_JARS) $(BIN)/python -m pytest $(PYTEST_ARGS) --timeout=600 -k hdfs \
		tests/contracts tests/services/test_hdfs.py
# Without the flag these tests run too, for seconds.
test-s3: venv
	CIUIC_SERVICES_LONG=1 $(BIN)/python -m pytest $(PYTEST_ARGS) --timeout=1800 \
		tests/contracts $(wildcard tests/services/test_s3_*.py)

# One cluster at a time on a machine: its monitor listens on the well-known ports.
test-ceph: venv
	@( for program in ceph-mon ceph-osd radosgw ceph; do command -v $$program >/dev/null || exit 1; done ) \
		|| { echo "there is no Ceph here; on Debian: apt-get install ceph-mon ceph-osd radosgw ceph-common" >&2; exit 1; }
	CIUIC_CEPH=1 $(BIN)/python -m pytest $(PYTEST_ARGS) --timeout=600 -k ceph tests/contracts

test-chain: venv
	CIUIC_CRASH_LONG=1 $(BIN)/python -m pytest $(PYTEST_ARGS) --timeout=1800 tests/chain

$(FUZZ_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,fuzz]'
	touch $@

# What breaks a promise is written to build/fuzz.
fuzz: $(FUZZ_STAMP)
	mkdir -p build/fuzz
	for target in $(sort $(notdir $(wildcard tests/fuzz/corpus/*))); do \
		CIUIC_FUZZ_FOUND=build/fuzz $(BIN)/python -m tests.fuzz.fuzz "$$target" $(FUZZ_SECONDS) || exit 1; done

mutations: venv
	$(BIN)/python -m tests.mutate

# Needs g++ and no Python.
sanitize:
	csrc/tests/build.sh build/sanitize

soak: venv
	CIUIC_SOAK=2000 $(BIN)/python -m tests.crash.soak --folder bench

# One weight file is read from resemblyzer: what it needs to run (audio libraries) is not installed.
$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,bench]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps resemblyzer
	touch $@

bench: $(BENCH_STAMP)
	for question in $(sort $(filter-out bench/report.py,$(wildcard bench/[a-z]*.py))); do \
		$(BIN)/python "$$question" || exit 1; done
	$(BIN)/python bench/report.py

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
