# Two targets do everything: `make run` and `make test`. `make help` lists all.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

GO ?= go
TOOL := $(GO) tool -modfile=tools/go.mod
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
DATA_DIR ?= /var/lib/cloudcode

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

.PHONY: run
run: deps build ## Install what is missing, build, and run everything on this machine
	bin/cloudcode up --data-dir $(DATA_DIR) $(ARGS)

.PHONY: deps
deps: ## Install what `make run` needs
	@scripts/install-deps.sh run

.PHONY: build
build: ## Build bin/cloudcode
	@echo "==> building bin/cloudcode"
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-X main.version=$(VERSION)" -o bin/cloudcode ./cmd/cloudcode

.PHONY: test
test: deps-test build lint unit e2e ## Install what is missing and pass all tests, real parts included

.PHONY: deps-test
deps-test:
	@scripts/install-deps.sh test

.PHONY: unit
unit: ## Test every package
	@echo "==> testing packages"
	$(GO) test -race -timeout 20m ./...

.PHONY: e2e
e2e: ## Test the whole: real containers, real OpenCode, unmodified clients, a browser
	@echo "==> testing end to end"
	$(GO) test -count=1 -timeout 30m -tags e2e ./internal/e2e/...

.PHONY: crash
crash: ROUNDS ?= 200
crash: deps-test ## Kill everything again and again (ROUNDS=200), and print what was lost
	$(GO) test -v -count=1 -timeout 3h -tags e2e -run '^TestCrash$$' ./internal/e2e/... -crash.rounds $(ROUNDS)

.PHONY: lint
lint: ## go vet, staticcheck, gofumpt, buf lint and breaking, generated code up to date
	@scripts/lint.sh

.PHONY: generate
generate: ## Generate code and documents from the proto files and the command line
	$(TOOL) buf generate
	$(GO) generate ./cmd/cloudcode

.PHONY: bench
bench: deps build ## Measure, side by side with what one would use instead
	$(GO) test -count=1 -timeout 30m -run '^$$' -bench . -benchtime 1x ./internal/checkpoint/...
	$(GO) test -count=1 -timeout 30m -tags e2e -run '^$$' -bench . -benchtime 1x ./internal/e2e/...

.PHONY: clean
clean: ## Remove what was built here (not the data directory)
	rm -rf bin dist
