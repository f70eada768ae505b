# extract-fcgi: `make help` lists the targets.
#
#   BUILD=dir                      builds elsewhere
#   SANITIZE=address,undefined     with sanitizers; SANITIZE=thread too
#   CC=clang  WERROR=1             another compiler; warnings are errors, as in CI
#   V=1                            shows the whole commands
#   PYTEST_JOBS=0                  end-to-end tests one after the other, for a debugger

BUILD    ?= build
SANITIZE ?=
WERROR   ?=
PYTEST_JOBS ?= 3
Q        := $(if $(V),,@)
VERSION  := 0.1.0

prefix      ?= /usr/local
bindir      ?= $(prefix)/bin
sbindir     ?= $(prefix)/sbin
datadir     ?= $(prefix)/share
mandir      ?= $(datadir)/man
completions ?= $(datadir)/bash-completion/completions
sysconfdir  ?= /etc
unitdir     ?= $(prefix)/lib/systemd/system
sysusersdir ?= $(prefix)/lib/sysusers.d
tmpfilesdir ?= $(prefix)/lib/tmpfiles.d
DESTDIR     ?=

LIBRARIES := fcgi libcurl json-c inih sqlite3 libcrypto libsodium
WARNINGS  := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wformat=2 -Wstrict-prototypes \
             -Wmissing-prototypes -Wvla -Wundef -Wwrite-strings $(if $(WERROR),-Werror)
HARDENING := -fstack-protector-strong -fstack-clash-protection -fcf-protection -fPIE \
             $(if $(SANITIZE),,-D_FORTIFY_SOURCE=3)
SANITIZER := $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
CFLAGS    ?= -O2 -g
CPPFLAGS  += -D_GNU_SOURCE -DEXTRACT_VERSION='"$(VERSION)"' -Iinclude $(shell pkg-config --cflags $(LIBRARIES))
COMPILE    = $(CC) -std=c17 $(CPPFLAGS) $(WARNINGS) $(HARDENING) $(SANITIZER) -pthread $(CFLAGS)
LINK       = $(CC) $(SANITIZER) -pthread -pie -Wl,-z,relro,-z,now $(LDFLAGS)
LDLIBS    += $(shell pkg-config --libs $(LIBRARIES)) -lunistring -lsybdb -lm

SOURCES  := $(wildcard fcgi-app/*.c)
PROGRAMS := extract-fcgi extractctl
CTL      := fcgi-app/extractctl.c $(wildcard fcgi-app/ctl_*.c)
COMMON   := $(filter-out fcgi-app/main.c $(CTL),$(SOURCES))
OBJECTS  := $(COMMON:%.c=$(BUILD)/%.o) $(BUILD)/fcgi-app/embed.o $(if $(filter thread,$(SANITIZE)),$(BUILD)/tests/tsan.o)
EMBEDDED := fcgi-app/invoice.schema.json fcgi-app/prompt.txt sql/setup_sqlite.sql \
            sql/setup_database.sql
UNITS    := $(patsubst tests/unit/%.c,$(BUILD)/tests/unit/%,$(wildcard tests/unit/test_*.c))
PROMETHEUS := $(abspath $(BUILD))/prometheus/usr/bin
PYTEST   := PATH="$$PATH:/usr/sbin:$(PROMETHEUS)" PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -m pytest -q -p no:cacheprovider

# What Debian 12 calls what is needed: to build, to run and to test.
BUILD_PACKAGES := gcc make pkg-config libc6-dev libfcgi-dev libcurl4-openssl-dev libjson-c-dev libinih-dev \
                  libsqlite3-dev libssl-dev libunistring-dev libsodium-dev freetds-dev
RUN_PACKAGES   := nginx-light spawn-fcgi multiwatch openssl curl ca-certificates python3
WWW_PACKAGES   := nodejs npm
TEST_PACKAGES  := libcmocka-dev python3-pytest python3-pytest-xdist python3-jsonschema python3-yaml python3-requests procps sqlite3 $(WWW_PACKAGES) \
                  freetds-bin systemd mandoc mono-mcs mono-runtime libmono-system-net-http4.0-cil libmono-system-runtime-serialization4.0-cil
BROWSER_PACKAGES := chromium fonts-dejavu-core
BENCH_PACKAGES := wrk libnginx-mod-http-lua python3-fastapi python3-uvicorn python3-httpx python3-multipart \
                  python3-pyodbc tdsodbc eatmydata strace valgrind
DEB_PACKAGES   := dpkg-dev binutils xz-utils
PACKAGE_PACKAGES := debootstrap systemd-container lintian git curl iproute2
LINT_PACKAGES  := clang clang-format clang-tidy libclang-rt-14-dev

.DELETE_ON_ERROR:

all: $(PROGRAMS:%=$(BUILD)/%) ## Build extract-fcgi and extractctl into build/

$(BUILD)/extract-fcgi: $(BUILD)/fcgi-app/main.o $(OBJECTS)
	@echo '  LINK  $@'
	$(Q)$(LINK) -o $@ $^ $(LDLIBS)

$(BUILD)/extractctl: $(CTL:%.c=$(BUILD)/%.o) $(OBJECTS)
	@echo '  LINK  $@'
	$(Q)$(LINK) -o $@ $^ $(LDLIBS)

$(BUILD)/%.o: %.c Makefile
	@mkdir -p $(@D)
	@echo '  CC    $@'
	$(Q)$(COMPILE) -MMD -MP -c -o $@ $<

$(BUILD)/fcgi-app/embed.o: fcgi-app/embed.S $(EMBEDDED)
	@mkdir -p $(@D)
	$(Q)$(CC) -fPIE -c -o $@ $<

$(BUILD)/tests/unit/%: $(BUILD)/tests/unit/%.o $(OBJECTS)
	@echo '  LINK  $@'
	$(Q)$(LINK) -o $@ $^ $(LDLIBS) -lcmocka

# The databases behind the store's contract tests.
$(BUILD)/tests/unit/test_store: $(patsubst %.c,$(BUILD)/%.o,$(wildcard tests/unit/store_*.c))

-include $(wildcard $(BUILD)/fcgi-app/*.d $(BUILD)/tests/unit/*.d $(BUILD)/tests/fuzz/*.d)

# The dashboard's plots are drawn by uPlot, from npm, its version and checksum in nginx/package-lock.json.
WWW   := nginx/www/extract-fcgi
UPLOT := $(WWW)/uplot.js $(WWW)/uplot.css $(WWW)/uplot.txt
www: $(UPLOT) ## Copy what the dashboard needs from npm into nginx/www/

$(UPLOT) &: nginx/package.json nginx/package-lock.json
	@mkdir -p $(BUILD)/npm
	cp nginx/package.json nginx/package-lock.json nginx/.npmrc $(BUILD)/npm
	cd $(BUILD)/npm && npm ci --loglevel=error --no-audit --no-fund
	install -m 644 $(BUILD)/npm/node_modules/uplot/dist/uPlot.esm.js $(WWW)/uplot.js
	install -m 644 $(BUILD)/npm/node_modules/uplot/dist/uPlot.min.css $(WWW)/uplot.css
	install -m 644 $(BUILD)/npm/node_modules/uplot/LICENSE $(WWW)/uplot.txt

deps: ## Install what building and running need (Debian 12; root or sudo)
	@tests/install-packages $(BUILD_PACKAGES) $(RUN_PACKAGES) $(WWW_PACKAGES)

deps-check: ## Install what the tests need, too
	@tests/install-packages $(BUILD_PACKAGES) $(RUN_PACKAGES) $(TEST_PACKAGES)

deps-bench:
	@tests/install-packages $(BUILD_PACKAGES) $(RUN_PACKAGES) $(TEST_PACKAGES) $(BENCH_PACKAGES)

deps-lint:
	@tests/install-packages $(BUILD_PACKAGES) $(TEST_PACKAGES) $(LINT_PACKAGES)

run: ## Install, build, start everything on https://localhost:8443, extract a sample; until Ctrl-C
	@$(MAKE) --no-print-directory deps
	@$(MAKE) --no-print-directory -j2 all www
	@BUILD=$(BUILD) tests/demo

demo: ## The same without staying: exit 0 only if the extraction succeeded
	@$(MAKE) --no-print-directory deps
	@$(MAKE) --no-print-directory -j2 all www
	@BUILD=$(BUILD) tests/demo --once

check: ## Install what tests need, build, run all tests
	@$(MAKE) --no-print-directory deps-check
	@$(MAKE) --no-print-directory -j2 all $(UNITS)
	@$(MAKE) --no-print-directory check-unit check-emulator check-openapi check-e2e

units: $(UNITS)

check-unit: $(UNITS) ## The unit tests alone
	@for t in $(UNITS); do echo "== $$t"; $$t || exit 1; done

check-emulator: ## The tests of what stands in for others: Gemini (with Google's client library), SQL Server (with FreeTDS)
	$(PYTEST) tests/emulator tests/tds_server
	tests/genai/run

check-openapi: ## nginx/openapi.yaml against the schema of OpenAPI 3.1 (that the service keeps to it, check-e2e looks at)
	tests/openapi/run

# Prometheus reads /metrics, promtool judges it and the alert rules.
$(PROMETHEUS)/promtool:
	@tests/unpack-package prometheus $(BUILD)/prometheus
	@touch $@

check-e2e: all www $(PROMETHEUS)/promtool ## The whole thing through a real nginx; T='-k name' chooses tests
	BUILD=$(BUILD) $(PYTEST) -n $(PYTEST_JOBS) --dist loadscope tests/e2e $(T)

# The fixtures are those of tests/e2e; node's own lines are the report.
check-browser: all www ## The page and the dashboard in Chromium; T='-k page' and BROWSER_TESTS='pattern' choose tests, SCREENSHOTS=dir keeps pictures
	@tests/install-packages $(RUN_PACKAGES) $(TEST_PACKAGES) $(BROWSER_PACKAGES)
	cd tests/browser && { [ -d node_modules/playwright-core ] || npm ci --loglevel=error --no-audit --no-fund; }
	BUILD=$(BUILD) PYTHONPATH=tests/e2e $(PYTEST) -s tests/browser $(T)

check-faults: all ## The fault matrix: kills, outages, full disks, broken networks (tests/README.md); T chooses
	BUILD=$(BUILD) $(PYTEST) tests/faults $(T)

check-package: ## The package on fresh Debian 12 systems, with systemd and without (root; tests/README.md); T chooses
	@tests/install-packages $(BUILD_PACKAGES) $(TEST_PACKAGES) $(DEB_PACKAGES) $(PACKAGE_PACKAGES)
	$(PYTEST) tests/package $(T)

soak: all ## Mixed load with random faults for SECONDS (60), then account and memory; SEED=n repeats one
	BUILD=$(BUILD) SOAK_SECONDS=$(SECONDS) SOAK_SEED=$(SEED) $(PYTEST) -s tests/faults/soak.py

# Each test makes a database of its own there and drops it; MSSQL_USER must be allowed to. With MSSQL_CA_FILE over
# TLS (or as MSSQL_ENCRYPT says: require, request, off); MSSQL_RIGHTS=no where there is no ownership chaining.
check-mssql: all $(BUILD)/tests/unit/test_store ## All that uses the store, on a live server: MSSQL_SERVER=host:port MSSQL_USER=… MSSQL_PASSWORD_FILE=…
	@test -n '$(MSSQL_SERVER)' && test -n '$(MSSQL_USER)' && test -r '$(MSSQL_PASSWORD_FILE)' || \
	    { echo 'make check-mssql MSSQL_SERVER=host:port MSSQL_USER=name MSSQL_PASSWORD_FILE=file' >&2; exit 2; }
	$(MSSQL) $(BUILD)/tests/unit/test_store mssql
	$(MSSQL) EXTRACT_TEST_STORE=mssql BUILD=$(BUILD) $(PYTEST) tests/e2e $(T)

MSSQL = MSSQL_SERVER='$(MSSQL_SERVER)' MSSQL_USER='$(MSSQL_USER)' MSSQL_PASSWORD_FILE='$(abspath $(MSSQL_PASSWORD_FILE))' \
        MSSQL_ENCRYPT='$(or $(MSSQL_ENCRYPT),$(if $(MSSQL_CA_FILE),require,off))' MSSQL_CA_FILE='$(MSSQL_CA_FILE)' MSSQL_RIGHTS='$(or $(MSSQL_RIGHTS),yes)'

bench: ## Measure, beside what people would use instead: PART=throughput,latency,cost,memory,growth,mssql RUNS=5 (tests/bench/README.md)
	@$(MAKE) --no-print-directory deps-bench
	@$(MAKE) --no-print-directory -j2 all $(BUILD)/tests/bench/floor $(BUILD)/tests/bench/count_io.so
	@$(if $(MSSQL_SERVER),$(MSSQL)) BUILD=$(BUILD) PART='$(PART)' RUNS='$(RUNS)' PATH="$$PATH:/usr/sbin" PYTHONDONTWRITEBYTECODE=1 \
	    /usr/bin/python3 tests/bench/bench.py

$(BUILD)/tests/bench/floor: tests/bench/floor.c tests/bench/floor_rows.c tests/bench/floor_rows.h Makefile
	@mkdir -p $(@D)
	$(Q)$(CC) -std=c17 $(CPPFLAGS) $(WARNINGS) -O2 -g -pthread -o $@ $(filter %.c,$^) $(LDFLAGS) $(LDLIBS)

$(BUILD)/tests/bench/count_io.so: tests/bench/count_io.c Makefile
	@mkdir -p $(@D)
	$(Q)$(CC) -std=c17 -D_GNU_SOURCE $(WARNINGS) -O2 -fno-builtin -fPIC -shared -o $@ $<

# make fuzz: two at a time, each with an output of its own, as tests/fuzz/README.md says.
FUZZERS := $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
SECONDS ?= 60
fuzz: ## Run each fuzzer for SECONDS (60) with clang's libFuzzer; FUZZERS='fuzz_json …' chooses
	@$(MAKE) --no-print-directory deps-lint
	@$(MAKE) --no-print-directory -j2 CC=clang BUILD=$(BUILD)/fuzz SANITIZE=fuzzer,address,undefined fuzzers
	@tests/fuzz/run $(BUILD)/fuzz $(SECONDS) $(FUZZERS)

fuzz-coverage: ## Which lines of the parsers the fuzzers' seeds reach
	@$(MAKE) --no-print-directory deps-lint
	@tests/install-packages llvm
	@$(MAKE) --no-print-directory -j2 CC=clang BUILD=$(BUILD)/fuzz-coverage SANITIZE=fuzzer \
	    CFLAGS='-O1 -g -fprofile-instr-generate -fcoverage-mapping' LDFLAGS=-fprofile-instr-generate fuzzers
	@tests/fuzz/coverage $(BUILD)/fuzz-coverage $(FUZZERS)

fuzzers: $(FUZZERS:%=$(BUILD)/tests/fuzz/%)

# What the targets share; they are linked with it.
FUZZ_SUPPORT := $(patsubst %.c,$(BUILD)/%.o,$(filter-out tests/fuzz/fuzz_%,$(wildcard tests/fuzz/*.c)))
$(BUILD)/tests/fuzz/%: $(BUILD)/tests/fuzz/%.o $(FUZZ_SUPPORT) $(OBJECTS)
	@echo '  LINK  $@'
	$(Q)$(LINK) $(FUZZ_WRAP:%=-Wl,--wrap=%) -o $@ $^ $(LDLIBS)

.SECONDARY: $(FUZZERS:%=$(BUILD)/tests/fuzz/%.o) $(FUZZ_SUPPORT)

# Functions that a target has of its own, in the place of the program's.
$(BUILD)/tests/fuzz/fuzz_fastcgi: FUZZ_WRAP := gemini_call
$(BUILD)/tests/fuzz/fuzz_mssql: FUZZ_WRAP := mssql_call
$(BUILD)/tests/fuzz/fuzz_outbox: FUZZ_WRAP := mssql_call log_to_stderr

BANNED := sprintf|strcpy|strcat|strncpy|strtok|atoi|gets|alloca|system|vfork
lint: ## Format, banned functions, clang-tidy
	@$(MAKE) --no-print-directory deps-lint
	clang-format --dry-run -Werror fcgi-app/*.c include/*.h tests/unit/*.c
	@! grep -nE '\b($(BANNED))\(' fcgi-app/*.c include/*.h || { echo 'banned functions'; exit 1; }
	clang-tidy --quiet $(SOURCES) -- -std=c17 $(CPPFLAGS)

format: ## Apply the repository's format
	clang-format -i fcgi-app/*.c include/*.h tests/unit/*.c

UNIT_FILES := extract-fcgi.socket extract-fcgi.service extract-fcgi@.service extract-fcgi.target
INSTALLED   = $(DESTDIR)$(datadir)/extract-fcgi
CONFIG_FILE = $(DESTDIR)$(sysconfdir)/extract-fcgi/extract-fcgi.conf
# The units and the guide name programs and files where they are installed.
PLACE       = sed -e 's|/usr/local/sbin|$(sbindir)|g' -e 's|/usr/local/share|$(datadir)|g' -e 's|/usr/local/lib/tmpfiles.d|$(tmpfilesdir)|g'

MANUALS := extractctl.1 extract-fcgi.conf.5 extract-fcgi.8
manuals: $(MANUALS:%=$(BUILD)/man/%) ## The manual pages, into build/man; what they say of keys and commands comes from the programs

$(BUILD)/man/%: systemd/man/%.in systemd/man/generate $(PROGRAMS:%=$(BUILD)/%)
	@mkdir -p $(@D)
	@echo '  MAN   $@'
	$(Q)systemd/man/generate $(BUILD) $< >$@

install: all manuals www ## Install programs, units, guides, and a configuration where there is none (DESTDIR, prefix)
	install -D -m 755 -t $(DESTDIR)$(sbindir) $(BUILD)/extract-fcgi
	install -D -m 755 -t $(DESTDIR)$(bindir) $(BUILD)/extractctl
	install -d -m 755 $(DESTDIR)$(unitdir)
	for unit in $(UNIT_FILES); do \
	    $(PLACE) systemd/$$unit > $(DESTDIR)$(unitdir)/$$unit && chmod 644 $(DESTDIR)$(unitdir)/$$unit || exit 1; done
	install -D -m 644 systemd/extract-fcgi.sysusers.conf $(DESTDIR)$(sysusersdir)/extract-fcgi.conf
	install -D -m 644 systemd/extract-fcgi.tmpfiles.conf $(DESTDIR)$(tmpfilesdir)/extract-fcgi.conf
	for page in $(MANUALS); do install -D -m 644 -t $(DESTDIR)$(mandir)/man$${page##*.} $(BUILD)/man/$$page || exit 1; done
	install -D -m 644 systemd/extractctl.completion.bash $(DESTDIR)$(completions)/extractctl
	install -D -m 644 -t $(INSTALLED) SECURITY.md systemd/extract-fcgi.conf.example fcgi-app/invoice.schema.json fcgi-app/prompt.txt
	install -D -m 644 tests/samples/invoice-de.pdf $(INSTALLED)/invoice.pdf
	install -D -m 644 -t $(INSTALLED)/systemd systemd/README.md systemd/credentials.conf.example \
	    systemd/extract-fcgi.rules.yml systemd/extract-fcgi.dashboard.json
	$(PLACE) systemd/README.md > $(INSTALLED)/systemd/README.md
	install -D -m 644 -t $(INSTALLED)/nginx nginx/*.conf nginx/README.md nginx/openapi.yaml
	install -D -m 644 -t $(INSTALLED)/nginx/www/extract-fcgi nginx/www/extract-fcgi/*
	install -D -m 644 -t $(INSTALLED)/sql sql/*.sql sql/README.md
	test -e $(CONFIG_FILE) || install -D -m 644 systemd/extract-fcgi.conf.example $(CONFIG_FILE)

uninstall: ## Remove what install has installed, but a configuration that was edited
	rm -f $(DESTDIR)$(sbindir)/extract-fcgi $(DESTDIR)$(bindir)/extractctl $(UNIT_FILES:%=$(DESTDIR)$(unitdir)/%) \
	    $(DESTDIR)$(sysusersdir)/extract-fcgi.conf $(DESTDIR)$(tmpfilesdir)/extract-fcgi.conf \
	    $(foreach page,$(MANUALS),$(DESTDIR)$(mandir)/man$(subst .,,$(suffix $(page)))/$(page)) $(DESTDIR)$(completions)/extractctl
	! cmp -s $(INSTALLED)/extract-fcgi.conf.example $(CONFIG_FILE) || rm $(CONFIG_FILE)
	rm -rf $(INSTALLED)

# The same tree gives the same bytes, wherever it lies: the last commit's time, which the files of `make dist` have, too.
SOURCE_DATE_EPOCH ?= $(shell { test -e .git && git log -1 --format=%ct || stat -c %Y Makefile; } 2>/dev/null)
deb: ## Build build/extract-fcgi_VERSION_ARCHITECTURE.deb, for Debian 12 (systemd/README.md)
	@tests/install-packages $(BUILD_PACKAGES) $(WWW_PACKAGES) $(DEB_PACKAGES)
	@rm -rf $(BUILD)/deb/root
	@$(MAKE) --no-print-directory -j2 BUILD=$(BUILD)/deb CFLAGS='-O2 -g -ffile-prefix-map=$(CURDIR)=.' all manuals
	@$(MAKE) --no-print-directory BUILD=$(BUILD)/deb CFLAGS='-O2 -g -ffile-prefix-map=$(CURDIR)=.' \
	    DESTDIR=$(BUILD)/deb/root prefix=/usr sysconfdir=/etc install >/dev/null
	@SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) systemd/deb/build $(BUILD)/deb $(VERSION)

dist: ## Build build/extract-fcgi-VERSION.tar.gz: the source of the last commit, which builds from itself
	@mkdir -p $(BUILD)
	git -c tar.umask=0022 archive --prefix=extract-fcgi-$(VERSION)/ -o $(BUILD)/extract-fcgi-$(VERSION).tar HEAD
	gzip -9nf $(BUILD)/extract-fcgi-$(VERSION).tar

clean: ## Remove build/
	rm -rf build $(UPLOT) tests/genai/node_modules tests/openapi/node_modules tests/browser/node_modules

help: ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 16

.PHONY: all www units deps deps-check deps-lint run demo check check-unit check-emulator check-openapi check-e2e check-browser check-faults check-package soak \
        check-mssql bench deps-bench fuzz fuzz-coverage fuzzers lint format manuals \
        install uninstall deb dist clean help
