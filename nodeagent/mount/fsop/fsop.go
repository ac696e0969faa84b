// Package fsop does in a child process what may hang for ever: anything that asks
// a FUSE file system.
//
// A request that a mounter has read and does not answer cannot be interrupted, not
// even by SIGKILL. A thread of ours that made it would be stuck, and would keep the
// node daemon's sockets and locks when the daemon is killed. A child is killed, and
// left behind where it does not die: it ends with its mounter. Callers make one at
// a time for a mount, so there is at most one such child for each hung mounter.
//
// The child is this very program: the init function below takes over when it is
// started under the child's name. The package imports next to nothing, so that
// this happens before the rest of the program initialises (a few ms).
package fsop

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// childName is argv[0] of a child.
const childName = "cloudcode-fsop"

// reapTimeout is how long a killed child may take to die before it counts as stuck.
const reapTimeout = time.Second

func init() {
	if os.Args[0] == childName {
		os.Exit(childMain())
	}
}

// StuckError says that the child did not end in time. It hangs in the kernel until
// its mounter is gone; Done is closed then.
type StuckError struct{ Done <-chan struct{} }

func (e *StuckError) Error() string { return "the file system does not answer" }

type request struct {
	Op    string
	Path  string   `json:",omitempty"`
	Names []string `json:",omitempty"`
	Attr  string   `json:",omitempty"`
	Tree  *tree    `json:",omitempty"`
}

type response struct {
	Error string        `json:",omitempty"`
	Errno syscall.Errno `json:",omitempty"`
	Names []string      `json:",omitempty"`
}

// Stat asks the file system itself for the root of a mount and for its own state,
// past every cache of the kernel.
func Stat(ctx context.Context, path string) error {
	_, err := run(ctx, request{Op: "stat", Path: path})
	return err
}

// Fsync of a folder.
func Fsync(ctx context.Context, path string) error {
	_, err := run(ctx, request{Op: "fsync", Path: path})
	return err
}

// Setxattr sets an attribute to "" on folders below path (no symlinks; "." is path
// itself), also where the mount is read-only. Those that are gone are left out.
func Setxattr(ctx context.Context, path, attr string, names ...string) error {
	_, err := run(ctx, request{Op: "setxattr", Path: path, Attr: attr, Names: names})
	return err
}

// List returns some names in a folder, at least one if there is any.
func List(ctx context.Context, path string) ([]string, error) {
	r, err := run(ctx, request{Op: "list", Path: path})
	return r.Names, err
}

// run makes the child do one thing. At the end of ctx it is killed: the error is
// that of ctx, and a *StuckError as well if it does not die.
func run(ctx context.Context, req request) (response, error) {
	if err := ctx.Err(); err != nil {
		return response{}, err
	}
	in, err := json.Marshal(req)
	if err != nil {
		return response{}, err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{childName}
	// GORACE: a program with the race detector sleeps for a second before it exits.
	cmd.Env = []string{"GOGC=off", "GOMAXPROCS=2", "GORACE=atexit_sleep_ms=0"}
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return response{}, err
	}
	var werr error
	done := make(chan struct{})
	go func() { // ends with the child; who waits is said at StuckError
		werr = cmd.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		_ = cmd.Process.Kill()
		t := time.NewTimer(reapTimeout)
		defer t.Stop()
		select {
		case <-done:
			return response{}, ctx.Err()
		case <-t.C:
			return response{}, fmt.Errorf("%w: %w", ctx.Err(), &StuckError{Done: done})
		}
	}
	var resp response
	if err := json.Unmarshal(stdout.Bytes(), &resp); err != nil {
		return response{}, fmt.Errorf("file operation %s: %w: %s", req.Op, errors.Join(werr, err), strings.TrimSpace(stderr.String()))
	}
	switch {
	case resp.Errno != 0 && resp.Error != "":
		return resp, fmt.Errorf("%s: %w", resp.Error, resp.Errno)
	case resp.Errno != 0:
		return resp, resp.Errno
	case resp.Error != "":
		return resp, errors.New(resp.Error)
	}
	return resp, nil
}
