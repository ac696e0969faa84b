package freezer

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const helper = "FREEZER_TEST_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helper) != "" {
		pid, _ := strconv.Atoi(os.Getenv(helper))
		if _, err := Freeze(context.Background(), pid); err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		os.Stdout.WriteString("frozen\n")
		select {} // until it is killed
	}
	goleak.VerifyTestMain(m)
}

// busy starts a process in a cgroup of its own; the returned file is what freezes it.
func busy(t *testing.T) (pid int, file string) {
	t.Helper()
	skip := func(why string) {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	if os.Geteuid() != 0 {
		skip("cgroups need root")
	}
	name := "cloudcode-freezer-test-" + strconv.Itoa(os.Getpid())
	root := "/sys/fs/cgroup/freezer"
	if _, err := os.Stat(root); err != nil {
		root = "/sys/fs/cgroup"
	}
	dir := filepath.Join(root, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		skip("cannot make a cgroup: " + err.Error())
	}
	cmd := exec.Command("sh", "-c", "while :; do :; done")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
		t.Fatal(err)
	}
	file, err := stateFile(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid, file
}

func ticks(t *testing.T, pid int) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(data))
	return f[13] + " " + f[14]
}

func isFrozen(t *testing.T, file string) bool {
	t.Helper()
	frozen, err := settled(file)
	if err != nil {
		t.Fatal(err)
	}
	return frozen
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 500 {
		if ok() {
			return
		}
		<-time.After(10 * time.Millisecond)
	}
	t.Fatal("not " + what)
}

func TestFreeze(t *testing.T) {
	pid, file := busy(t)
	for range 3 {
		thaw, err := Freeze(t.Context(), pid)
		if err != nil {
			t.Fatal(err)
		}
		before := ticks(t, pid)
		<-time.After(30 * time.Millisecond)
		if !isFrozen(t, file) || ticks(t, pid) != before {
			t.Error("it ran while it was frozen")
		}
		if err := thaw(); err != nil {
			t.Fatal(err)
		}
		if isFrozen(t, file) {
			t.Error("still frozen")
		}
		until(t, "running again", func() bool { return ticks(t, pid) != before })
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Freeze(ctx, pid); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that has ended: %v", err)
	}
	if isFrozen(t, file) {
		t.Error("left frozen")
	}
}

// TestDaemonDies: whoever has frozen it is killed.
func TestDaemonDies(t *testing.T) {
	pid, file := busy(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helper+"="+strconv.Itoa(pid))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 7)
	if _, err := out.Read(line); err != nil || !isFrozen(t, file) {
		t.Fatalf("not frozen: %q, %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	until(t, "thawed", func() bool { return !isFrozen(t, file) })
}

func TestNoProcess(t *testing.T) {
	if _, err := Freeze(t.Context(), 1<<30); !errors.Is(err, ErrGone) {
		t.Error(err)
	}
	if _, err := Freeze(t.Context(), os.Getpid()); err == nil {
		t.Error("froze a process that has no cgroup of its own")
	}
}

func TestStateFile(t *testing.T) {
	mounts := []byte(`30 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
31 24 0:28 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
32 24 0:29 /part /part rw - cgroup2 cgroup2 rw
`)
	for _, c := range []struct{ kind, controller, group, want string }{
		{"cgroup", "freezer", "/", "freeze the machine"},
		{"cgroup2", "", "/elsewhere", "no mount of cgroup2"},
		{"cgroup2", "", "/part/of", "/part/of/cgroup.freeze"},
	} {
		got, err := inside(mounts, c.kind, c.controller, c.group, "cgroup.freeze")
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %q, %v", c, got, err)
		}
	}
}
