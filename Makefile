# extract-fcgi: `make help` lists the targets.
#
# BUILD=dir builds elsewhere; SANITIZE=address,undefined or SANITIZE=thread builds with sanitizers;
# CC=clang works too; WERROR=1 makes warnings errors, as CI does.

BUILD    ?= build
SANITIZE ?=
WERROR   ?=
prefix   ?= /usr/local
sbindir  ?= $(prefix)/sbin
bindir   ?= $(prefix)/bin
DESTDIR  ?=
VERSION  := 0.1.0

PACKAGES := fcgi libcurl json-c inih sqlite3 libcrypto
WARNINGS := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wformat=2 -Wstrict-prototypes \
            -Wmissing-prototypes -Wvla -Wundef -Wwrite-strings $(if $(WERROR),-Werror)
HARDEN   := -fstack-protector-strong -fstack-clash-protection -fcf-protection -fPIE
SANFLAGS := $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-omit-frame-pointer)
CFLAGS   ?= -O2 -g
CPPFLAGS += -D_GNU_SOURCE -DEXTRACT_VERSION='"$(VERSION)"' -Iinclude -I. \
            $(if $(SANITIZE),,-D_FORTIFY_SOURCE=3) $(shell pkg-config --cflags $(PACKAGES) 2>/dev/null)
ALL_CFLAGS = -std=c17 $(WARNINGS) $(HARDEN) $(SANFLAGS) -pthread $(CFLAGS)
LDFLAGS  += -pie -Wl,-z,relro,-z,now $(SANFLAGS) -pthread
LDLIBS   := $(shell pkg-config --libs $(PACKAGES) 2>/dev/null) -lunistring -lm

SOURCES  := $(wildcard fcgi-app/*.c)
PROGRAMS := extract-fcgi extractctl
COMMON   := $(filter-out fcgi-app/main.c fcgi-app/extractctl.c,$(SOURCES))
OBJECTS   = $(COMMON:%.c=$(BUILD)/%.o) $(BUILD)/fcgi-app/embed.o

all: $(PROGRAMS:%=$(BUILD)/%) ## Build extract-fcgi and extractctl into build/

$(BUILD)/extract-fcgi: $(BUILD)/fcgi-app/main.o $(OBJECTS)
	$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(BUILD)/extractctl: $(BUILD)/fcgi-app/extractctl.o $(OBJECTS)
	$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(BUILD)/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<

# The prompt, the schemas: compiled in as they are.
$(BUILD)/fcgi-app/embed.o: fcgi-app/embed.S fcgi-app/invoice.schema.json fcgi-app/prompt.txt sql/setup_sqlite.sql
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) -fPIE -c -o $@ $<

-include $(SOURCES:%.c=$(BUILD)/%.d)

clean: ## Remove build/
	rm -rf build

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: all clean help
