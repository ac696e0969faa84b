package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/runtimetest"
)

// restarted returns a second runtime on the same state, as after a kill -9 of
// the node daemon.
func (e *env) restarted(t *testing.T) *Runtime {
	t.Helper()
	r, err := New(testContext(t), e.cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func TestAdoption(t *testing.T) {
	e := newEnv(t)
	e.importImage(t, testImage)
	spec := e.spec("one", "serve", "8080")
	spec.Env = map[string]string{"SECRET": "x"}
	inst := e.mustEnsure(t, spec)
	r := e.restarted(t)
	list, err := r.List(testContext(t))
	if err != nil || len(list) != 1 || list[0].PID != inst.PID || !runtime.SameContainer(list[0].Spec, spec) || list[0].State != runtime.StateRunning {
		t.Fatalf("List = %+v, %v", list, err)
	}
	again, err := r.Ensure(testContext(t), spec, nil)
	if err != nil || again.PID != inst.PID {
		t.Errorf("Ensure after a restart = %+v, %v", again, err)
	}
	e.mustAsk(t, "one", "/")
	if err := r.Stop(testContext(t), "one", time.Second); err != nil {
		t.Error(err)
	}
}

// TestContainerdDies kills containerd under a container: the container goes
// on, Wait too, and so do later calls.
func TestContainerdDies(t *testing.T) {
	e := newEnv(t)
	e.importImage(t, testImage)
	ctx := testContext(t)
	inst := e.mustEnsure(t, e.spec("one", "serve", "8080"))
	e.mustAsk(t, "one", "/")
	type result struct {
		exit runtime.Exit
		err  error
	}
	waited := make(chan result, 1)
	go func() {
		exit, err := e.Wait(ctx, "one")
		waited <- result{exit, err}
	}()
	// The call must be on its way: only then is it cut off rather than refused.
	until(t, func() error {
		stacks := make([]byte, 4<<20)
		if stacks = stacks[:goruntime.Stack(stacks, true)]; !bytes.Contains(stacks, []byte("tasksClient).Wait")) {
			return errors.New("no call of Wait is under way")
		}
		return nil
	})
	pid := e.daemon.PID()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	e.mustAsk(t, "one", "/") // needs no containerd
	until(t, func() error {
		if now := e.daemon.PID(); now == pid || now == 0 {
			return fmt.Errorf("containerd is %d, was %d", now, pid)
		}
		list, err := e.List(ctx)
		if err == nil && (len(list) != 1 || list[0].PID != inst.PID) {
			err = fmt.Errorf("List = %+v", list)
		}
		return err
	})
	select {
	case res := <-waited:
		t.Fatalf("Wait ended with containerd: %+v", res)
	default:
	}
	if err := unix.Kill(inst.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if res := <-waited; res.err != nil || res.exit.Code != 137 {
		t.Errorf("Wait = %+v", res)
	}
}

// until tries again for a bounded time.
func until(t *testing.T, fn func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		err := fn()
		if err == nil {
			return
		}
		timer := time.NewTimer(20 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			t.Fatal(err)
		}
	}
}

// TestDaemonAdoption starts a second manager on a containerd that runs.
// containerd and its shims live on, and run what others have made.
func TestDaemonHasNoSecrets(t *testing.T) {
	for _, name := range []string{"S3_SECRET_ACCESS_KEY", "CLOUDCODE_ENCRYPTION_KEY", "SERVER_PASSWORD"} {
		t.Setenv(name, "hunter2")
	}
	e := newEnv(t)
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", e.daemon.PID()))
	if err != nil || !strings.Contains(string(data), "PATH=") || strings.Contains(string(data), "hunter2") {
		t.Errorf("%q, %v", data, err)
	}
}

func TestDaemonAdoption(t *testing.T) {
	e := newEnv(t)
	d, err := StartDaemon(testContext(t), e.daemon.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if d.PID() != e.daemon.PID() {
		t.Errorf("a second containerd was started")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := e.List(testContext(t)); err != nil {
		t.Errorf("Close ended containerd: %v", err)
	}
	// One that hangs is replaced.
	if err := unix.Kill(e.daemon.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	hung := e.daemon.PID()
	if d, err = StartDaemon(testContext(t), e.daemon.cfg); err != nil {
		t.Fatal(err)
	}
	if d.PID() == hung {
		t.Error("a containerd that does not answer was adopted")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	until(t, func() error { // the first manager sees the death, and adopts the new one
		if e.daemon.PID() == hung {
			return errors.New("still the old process")
		}
		return nil
	})
}

func TestDaemonDoesNotStart(t *testing.T) {
	needReal(t)
	dir := t.TempDir()
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"containerd", "containerd-shim-runc-v2", "runc"} {
		if err := os.WriteFile(filepath.Join(bin, p), []byte("#!/bin/sh\necho the reason >&2; exit 1\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	_, err := StartDaemon(testContext(t), DaemonConfig{BinDir: bin, Dir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run")})
	if !errors.Is(err, runtime.ErrUnavailable) || !strings.Contains(err.Error(), "the reason") {
		t.Errorf("StartDaemon = %v, want the end of the log", err)
	}
	_, err = StartDaemon(testContext(t), DaemonConfig{BinDir: bin, Dir: dir, RunDir: "/run/" + strings.Repeat("x", 100)})
	if err == nil || !strings.Contains(err.Error(), "104") {
		t.Errorf("a long socket path: %v", err)
	}
}

// TestLeftovers makes what a killed daemon leaves at each step.
func TestLeftovers(t *testing.T) {
	e := newEnv(t)
	e.importImage(t, testImage)
	ctx, done, err := e.client.WithLease(e.ns(testContext(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := done(ctx); err != nil {
			t.Error(err)
		}
	}()
	img, err := e.client.GetImage(ctx, testImage)
	if err != nil {
		t.Fatal(err)
	}

	// A task that was created, pinned and connected, but never started.
	spec := e.spec("created", "serve", "8080")
	rec := record{Spec: spec}
	if err := e.saveRecord(rec); err != nil {
		t.Fatal(err)
	}
	files, err := e.writeFiles(spec)
	if err != nil {
		t.Fatal(err)
	}
	oci, err := e.ociSpec(ctx, spec, img, files)
	if err != nil {
		t.Fatal(err)
	}
	rootfs, err := e.rootfs(ctx, spec, img)
	if err != nil {
		t.Fatal(err)
	}
	c, err := e.client.NewContainer(ctx, "created", ctd.WithSpec(oci), e.withRuntime(spec), ctd.WithContainerLabels(map[string]string{labelSession: "created"}))
	if err != nil {
		t.Fatal(err)
	}
	task, err := c.NewTask(ctx, cio.NullIO, ctd.WithRootFS(rootfs))
	if err != nil {
		t.Fatal(err)
	}
	if err := pinNetns(task.Pid(), e.netnsPath("created")); err != nil {
		t.Fatal(err)
	}
	if _, err := e.net.add(ctx, "created", e.netnsPath("created")); err != nil {
		t.Fatal(err)
	}
	// A container without a task, and one without a record.
	for _, id := range []string{"taskless", "recordless"} {
		if _, err := e.client.NewContainer(ctx, id, ctd.WithSpec(oci), ctd.WithContainerLabels(map[string]string{labelSession: id})); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.saveRecord(record{Spec: e.spec("taskless")}); err != nil {
		t.Fatal(err)
	}
	// A namespace, an address and a record without a container.
	pinNew(t, e.netnsPath("pinned"))
	// The machine's own namespace must never be taken for a container's.
	if err := pinNetns(uint32(os.Getpid()), e.netnsPath("host")); err != nil {
		t.Fatal(err)
	}
	before, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.saveRecord(record{Spec: e.spec("recorded")}); err != nil {
		t.Fatal(err)
	}
	lease := filepath.Join(e.net.ipamDir, e.net.conf.Name, e.subnet.Addr().Next().Next().Next().Next().String())
	if err := os.WriteFile(lease, []byte("addressed\r\neth0"), 0o600); err != nil {
		t.Fatal(err)
	}
	// And what is not ours.
	if _, err := e.client.NewContainer(ctx, "foreign", ctd.WithSpec(oci)); err != nil {
		t.Fatal(err)
	}

	live := e.mustEnsure(t, e.spec("live", "serve", "8080"))
	r := e.restarted(t)
	list, err := r.List(ctx)
	if err != nil || len(list) != 1 || list[0].PID != live.PID {
		t.Errorf("List = %+v, %v; want the live one", list, err)
	}
	sessions, err := r.containers(ctx)
	if err != nil || len(sessions) != 1 {
		t.Errorf("containers left: %v %v", sessions, err)
	}
	held, err := r.net.allocated()
	if err != nil || len(held) != 1 || held[0] != "live" {
		t.Errorf("addresses held: %v %v", held, err)
	}
	for _, dir := range []string{netnsDir(e.cfg.StateDir), sessionsDir(e.cfg.StateDir)} {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 || entries[0].Name() != "live" {
			t.Errorf("left in %s: %v %v", dir, entries, err)
		}
	}
	after, err := netlink.LinkList()
	if err != nil || len(after) < len(before) {
		t.Errorf("the machine had %d interfaces, now %d: %v", len(before), len(after), err)
	}
	if err := e.client.ContainerService().Delete(ctx, "foreign"); err != nil {
		t.Errorf("a container that is not ours was removed: %v", err)
	}
	e.mustAsk(t, "live", "/")
}

// pinNew pins a fresh network namespace.
func pinNew(t *testing.T, path string) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		goruntime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- pinNetns(uint32(unix.Gettid()), path)
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TestFailedStart makes starts fail at each step and looks for what is left.
func TestFailedStart(t *testing.T) {
	e := newEnv(t)
	e.importImage(t, testImage)
	for name, c := range map[string]struct {
		change func(*runtime.Spec)
		want   error
	}{
		"no such program": {func(s *runtime.Spec) { s.Args = []string{"/no/such/program"} }, runtime.ErrInvalidSpec},
		"not a program":   {func(s *runtime.Spec) { s.Args = []string{"/etc/variant"} }, runtime.ErrInvalidSpec},
		"not in PATH":     {func(s *runtime.Spec) { s.Args = []string{"nonsense"} }, runtime.ErrInvalidSpec},
		"missing mount":   {func(s *runtime.Spec) { s.Mounts = []runtime.Mount{{Source: "/no/such", Destination: "/x"}} }, os.ErrNotExist},
	} {
		spec := e.spec("fails", "serve", "8080")
		c.change(&spec)
		start := time.Now()
		_, err := e.Ensure(testContext(t), spec, nil)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		t.Logf("%s: %s: %v", name, time.Since(start), err)
		sessions, err := e.containers(e.ns(testContext(t)))
		if err != nil || len(sessions) != 0 {
			t.Errorf("%s: containers left: %v %v", name, sessions, err)
		}
		held, _ := e.net.allocated()
		if len(held) != 0 {
			t.Errorf("%s: addresses left: %v", name, held)
		}
		for _, p := range []string{e.netnsPath("fails"), e.sessionDir("fails")} {
			if _, err := os.Lstat(p); err == nil {
				t.Errorf("%s: %s left", name, p)
			}
		}
	}
	// And the session can start afterwards.
	e.mustEnsure(t, e.spec("fails", "serve", "8080"))
	e.mustAsk(t, "fails", "/")
}

func TestPull(t *testing.T) {
	e := newEnv(t)
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")
	ref, err := name.ParseReference(host + "/team/agent:v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, runtimetest.Image(t, "pulled")); err != nil {
		t.Fatal(err)
	}
	spec := e.spec("one", "serve", "8080")
	spec.Image = ref.String()
	var phases []runtime.Progress
	if _, err := e.Ensure(testContext(t), spec, &runtime.Hooks{Progress: func(p runtime.Progress) { phases = append(phases, p) }}); err != nil {
		t.Fatal(err)
	}
	if len(phases) < 2 || phases[0].Phase != runtime.PhaseImage || phases[len(phases)-1].Phase != runtime.PhaseContainer {
		t.Errorf("progress %+v", phases)
	}
	e.mustAsk(t, "one", "/")

	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	for image, want := range map[string]error{
		host + "/team/agent:v2":               runtime.ErrImageNotFound,
		closed.Addr().String() + "/a/b:c":     runtime.ErrImagePull,
		"localhost/cloudcode/nothing":         runtime.ErrImageNotFound,
		"Not A Reference":                     runtime.ErrInvalidSpec,
		host + "/team/agent@sha256:" + "0123": runtime.ErrInvalidSpec,
	} {
		spec.Session, spec.Image = "other", image
		_, err := e.Ensure(testContext(t), spec, nil)
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", image, err, want)
		}
	}
}

func TestNetworkConfig(t *testing.T) {
	e := newEnv(t)
	cfg := e.cfg
	for _, subnet := range []string{"nonsense", "fd00::/64", "10.0.0.0/31"} {
		cfg.Subnet = subnet
		if r, err := New(testContext(t), cfg); err == nil || !strings.Contains(err.Error(), "IPv4 range") {
			t.Errorf("subnet %s: %v", subnet, err)
			if r != nil {
				_ = r.Close()
			}
		}
	}
	// A subnet that somebody else routes.
	out, err := exec.Command("ip", "link", "add", "ccother0", "type", "bridge").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer exec.Command("ip", "link", "del", "ccother0").Run()
	for _, args := range [][]string{{"link", "set", "ccother0", "up"}, {"addr", "add", "10.254.7.1/24", "dev", "ccother0"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	cfg.BridgeName, cfg.Subnet = cfg.BridgeName[:len(cfg.BridgeName)-1]+"x", "10.254.0.0/16"
	if r, err := New(testContext(t), cfg); err == nil || !strings.Contains(err.Error(), "overlaps") {
		t.Errorf("an overlapping subnet: %v", err)
		if r != nil {
			_ = r.Close()
		}
	}
}

// TestTwoOnOneMachine: two private containerds with the same namespace and
// session ids know nothing of one another.
func TestTwoOnOneMachine(t *testing.T) {
	a, b := newEnv(t), newEnv(t)
	for i, e := range []*env{a, b} {
		e.importImage(t, testImage)
		spec := e.spec("main", "serve", "8080")
		spec.Resources.MemoryBytes = int64(64+i) << 20
		e.mustEnsure(t, spec)
	}
	if err := a.Kill(testContext(t), "main"); err != nil {
		t.Fatal(err)
	}
	b.mustAsk(t, "main", "/")
	b.checkLimits(t, "main", runtime.Resources{MemoryBytes: 65 << 20})
}
