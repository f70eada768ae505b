# extract-fcgi: `make help` lists the targets.
#
#   BUILD=dir                      builds elsewhere
#   SANITIZE=address,undefined     with sanitizers; SANITIZE=thread too
#   CC=clang  WERROR=1             another compiler; warnings are errors, as in CI
#   V=1                            shows the whole commands

BUILD    ?= build
SANITIZE ?=
WERROR   ?=
Q        := $(if $(V),,@)
VERSION  := 0.1.0

prefix     ?= /usr/local
bindir     ?= $(prefix)/bin
sbindir    ?= $(prefix)/sbin
datadir    ?= $(prefix)/share
DESTDIR    ?=

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
OBJECTS  := $(COMMON:%.c=$(BUILD)/%.o) $(BUILD)/fcgi-app/embed.o
EMBEDDED := fcgi-app/invoice.schema.json fcgi-app/prompt.txt sql/setup_sqlite.sql \
            sql/setup_database.sql
UNITS    := $(patsubst tests/unit/%.c,$(BUILD)/tests/unit/%,$(wildcard tests/unit/test_*.c))
PYTEST   := PATH="$$PATH:/usr/sbin" PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -m pytest -q -p no:cacheprovider

# What Debian 12 calls what is needed: to build, to run and to test.
BUILD_PACKAGES := gcc make pkg-config libc6-dev libfcgi-dev libcurl4-openssl-dev libjson-c-dev libinih-dev \
                  libsqlite3-dev libssl-dev libunistring-dev libsodium-dev freetds-dev
RUN_PACKAGES   := nginx-light spawn-fcgi multiwatch openssl curl ca-certificates python3
TEST_PACKAGES  := libcmocka-dev python3-pytest procps sqlite3 nodejs npm freetds-bin
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

-include $(wildcard $(BUILD)/fcgi-app/*.d $(BUILD)/tests/unit/*.d)

deps: ## Install what building and running need (Debian 12; root or sudo)
	@tests/install-packages $(BUILD_PACKAGES) $(RUN_PACKAGES)

deps-check: ## Install what the tests need, too
	@tests/install-packages $(BUILD_PACKAGES) $(RUN_PACKAGES) $(TEST_PACKAGES)

deps-lint:
	@tests/install-packages $(BUILD_PACKAGES) $(TEST_PACKAGES) $(LINT_PACKAGES)

run: ## Install, build, start everything on https://localhost:8443, extract a sample; until Ctrl-C
	@$(MAKE) --no-print-directory deps
	@$(MAKE) --no-print-directory -j2 all
	@BUILD=$(BUILD) tests/demo

demo: ## The same without staying: exit 0 only if the extraction succeeded
	@$(MAKE) --no-print-directory deps
	@$(MAKE) --no-print-directory -j2 all
	@BUILD=$(BUILD) tests/demo --once

check: ## Install what tests need, build, run all tests
	@$(MAKE) --no-print-directory deps-check
	@$(MAKE) --no-print-directory -j2 all $(UNITS)
	@$(MAKE) --no-print-directory check-unit check-emulator check-e2e

units: $(UNITS)

check-unit: $(UNITS) ## The unit tests alone
	@for t in $(UNITS); do echo "== $$t"; $$t || exit 1; done

check-emulator: ## The tests of what stands in for others: Gemini (with Google's client library), SQL Server (with FreeTDS)
	$(PYTEST) tests/emulator tests/tds_server
	tests/genai/run

check-e2e: all ## The whole thing through a real nginx; T='-k name' chooses tests
	BUILD=$(BUILD) $(PYTEST) tests/e2e $(T)

# Each test makes a database of its own there and drops it; MSSQL_USER must be allowed to. With MSSQL_CA_FILE over
# TLS (or as MSSQL_ENCRYPT says: require, request, off); MSSQL_RIGHTS=no where there is no ownership chaining.
check-mssql: all $(BUILD)/tests/unit/test_store ## All that uses the store, on a live server: MSSQL_SERVER=host:port MSSQL_USER=… MSSQL_PASSWORD_FILE=…
	@test -n '$(MSSQL_SERVER)' && test -n '$(MSSQL_USER)' && test -r '$(MSSQL_PASSWORD_FILE)' || \
	    { echo 'make check-mssql MSSQL_SERVER=host:port MSSQL_USER=name MSSQL_PASSWORD_FILE=file' >&2; exit 2; }
	$(MSSQL) $(BUILD)/tests/unit/test_store mssql
	$(MSSQL) EXTRACT_TEST_STORE=mssql BUILD=$(BUILD) $(PYTEST) tests/e2e $(T)

MSSQL = MSSQL_SERVER='$(MSSQL_SERVER)' MSSQL_USER='$(MSSQL_USER)' MSSQL_PASSWORD_FILE='$(abspath $(MSSQL_PASSWORD_FILE))' \
        MSSQL_ENCRYPT='$(or $(MSSQL_ENCRYPT),$(if $(MSSQL_CA_FILE),require,off))' MSSQL_CA_FILE='$(MSSQL_CA_FILE)' MSSQL_RIGHTS='$(or $(MSSQL_RIGHTS),yes)'

FUZZERS := $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
SECONDS ?= 60
fuzz: ## Run each fuzzer for SECONDS (60) with clang's libFuzzer
	@$(MAKE) --no-print-directory deps-lint
	@$(MAKE) --no-print-directory -j2 CC=clang BUILD=build/fuzz SANITIZE=fuzzer,address,undefined fuzzers
	@for f in $(FUZZERS); do mkdir -p build/fuzz/corpus/$$f; echo "== $$f"; \
	    build/fuzz/tests/fuzz/$$f -max_total_time=$(SECONDS) -rss_limit_mb=2048 -verbosity=0 -print_final_stats=1 \
	        -artifact_prefix=build/fuzz/ build/fuzz/corpus/$$f $$(ls -d tests/fuzz/corpus/$$f 2>/dev/null) || exit 1; done

fuzzers: $(FUZZERS:%=$(BUILD)/tests/fuzz/%)

$(BUILD)/tests/fuzz/%: $(BUILD)/tests/fuzz/%.o $(OBJECTS)
	@echo '  LINK  $@'
	$(Q)$(LINK) -o $@ $^ $(LDLIBS)

BANNED := sprintf|strcpy|strcat|strncpy|strtok|atoi|gets|alloca|system|vfork
lint: ## Format, banned functions, clang-tidy
	@$(MAKE) --no-print-directory deps-lint
	clang-format --dry-run -Werror fcgi-app/*.c include/*.h tests/unit/*.c
	@! grep -nE '\b($(BANNED))\(' fcgi-app/*.c include/*.h || { echo 'banned functions'; exit 1; }
	clang-tidy --quiet $(SOURCES) -- -std=c17 $(CPPFLAGS)

format: ## Apply the repository's format
	clang-format -i fcgi-app/*.c include/*.h tests/unit/*.c

install: all ## Install programs, example configuration and nginx files (DESTDIR, prefix)
	install -D -m 755 $(BUILD)/extract-fcgi $(DESTDIR)$(sbindir)/extract-fcgi
	install -D -m 755 $(BUILD)/extractctl $(DESTDIR)$(bindir)/extractctl
	install -D -m 644 systemd/extract-fcgi.conf.example $(DESTDIR)$(datadir)/extract-fcgi/extract-fcgi.conf.example
	install -D -m 644 -t $(DESTDIR)$(datadir)/extract-fcgi/nginx nginx/*.conf nginx/README.md
	install -D -m 644 -t $(DESTDIR)$(datadir)/extract-fcgi $(EMBEDDED)

uninstall: ## Remove what install has installed
	rm -f $(DESTDIR)$(sbindir)/extract-fcgi $(DESTDIR)$(bindir)/extractctl
	rm -rf $(DESTDIR)$(datadir)/extract-fcgi

clean: ## Remove build/
	rm -rf build tests/genai/node_modules

help: ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 16

.PHONY: all units deps deps-check deps-lint run demo check check-unit check-emulator check-e2e check-mssql fuzz lint format \
        install uninstall clean help
