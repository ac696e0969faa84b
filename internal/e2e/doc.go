// Package e2e tests Cloud Code from end to end: the real binary, real
// containers, the real image, real OpenCode with a scripted model, and
// unmodified clients. Its tests have the build tag e2e and run by `make e2e`;
// its benchmarks by `make bench`.
//
// They need root, the tools in libexec/cloudcode (`make deps-test` or
// CLOUDCODE_LIBEXEC_DIR) and npm; some need chromium and tmux. Without them
// they are skipped, or fail if CLOUDCODE_REQUIRE_REAL=1. CLOUDCODE_E2E_CACHE
// names the folder that keeps the session image and npm packages between runs;
// by default it is cloudcode in the user's cache folder. CLOUDCODE_E2E_KEEP
// names a folder where screenshots and the processes' logs are kept.
package e2e
