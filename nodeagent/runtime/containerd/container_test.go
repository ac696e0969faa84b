package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/containerd/logger"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/runtimetest"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
)

// ask sends a request to the helper in the container, again until it listens.
func (e *env) ask(t testing.TB, session, path string) (string, error) {
	t.Helper()
	ctx := testContext(t)
	c := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return e.Dial(ctx, session, runtimetest.Port)
		},
	}}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://session"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := c.Do(req)
		if err == nil {
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			if err == nil && res.StatusCode != http.StatusOK {
				err = errors.New(strings.TrimSpace(string(body)))
			}
			return string(body), err
		}
		timer := time.NewTimer(10 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			t.Fatalf("session %s does not answer: %v", session, err)
		}
	}
}

func (e *env) mustAsk(t testing.TB, session, path string) string {
	t.Helper()
	out, err := e.ask(t, session, path)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return out
}

func (e *env) mustEnsure(t testing.TB, spec runtime.Spec) runtime.Instance {
	t.Helper()
	inst, err := e.Ensure(testContext(t), spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	return inst
}

// TestIsolation looks at one container from inside and from outside.
func TestIsolation(t *testing.T) {
	e := newEnv(t)
	e.importImage(t, testImage)
	spec := e.spec("one", "serve", "8080")
	spec.Env = map[string]string{"BOTH": "session", "SECRET": "s3cr3t"}
	spec.Resources = runtime.Resources{CPUMillis: 500, MemoryBytes: 100 << 20, PIDs: 77}
	inst := e.mustEnsure(t, spec)
	other := e.spec("two", "serve", "8080")
	other.IDBase += runtime.IDMapSize
	e.mustEnsure(t, other)

	status := e.mustAsk(t, "one", "/read?path=/proc/self/status")
	for _, want := range []string{"CapEff:\t00000000800404fb", "CapBnd:\t00000000800404fb", "CapInh:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(status, want) {
			t.Errorf("status lacks %q", want)
		}
	}
	outside, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", inst.PID))
	if err != nil || !strings.Contains(string(outside), fmt.Sprintf("Uid:\t%d\t%[1]d", spec.IDBase)) {
		t.Errorf("root inside is not %d outside: %v", spec.IDBase, err)
	}
	if score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", inst.PID)); err != nil || strings.TrimSpace(string(score)) != "500" {
		t.Errorf("oom_score_adj %s %v", score, err)
	}

	e.mustAsk(t, "one", "/write?path=/etc/new&data=x")
	for path, want := range map[string]string{
		"/env?name=BOTH":                      "session",
		"/env?name=FROM_IMAGE":                "yes",
		"/stat?path=/":                        "0 0 40755",
		"/stat?path=/bin/helper":              "0 0 100755",
		"/read?path=/etc/hostname":            "one\n",
		"/listen?addr=:80":                    "",
		"/listen?addr=[::1]:81":               "",
		"/stat?path=/etc/new":                 "0 0 100644",
		"/read?path=/proc/sys/kernel/ostype":  "Linux\n",
		"/read?path=/proc/1/cgroup":           "*",
		"/write?path=/dev/shm/x&data=x":       "",
		"/dial?addr=" + e.hostAddr(t) + ":22": "refused or open",
	} {
		got, err := e.ask(t, "one", path)
		switch want {
		case "refused or open":
			if err != nil && !strings.Contains(err.Error(), "refused") {
				t.Errorf("%s: the gateway is not reachable: %v", path, err)
			}
		case "*":
			if err != nil || strings.Contains(got, "one") {
				t.Errorf("%s shows the machine's cgroups: %s %v", path, got, err)
			}
		default:
			if err != nil || got != want {
				t.Errorf("%s = %q %v, want %q", path, got, err, want)
			}
		}
	}
	addrs := e.mustAsk(t, "one", "/addrs")
	if strings.Contains(addrs, "fe80") {
		t.Errorf("IPv6 is on: %s", addrs)
	}
	if hosts := e.mustAsk(t, "one", "/read?path=/etc/hosts"); !strings.Contains(addrs, strings.Fields(hosts)[len(strings.Fields(hosts))-2]+"/") {
		t.Errorf("/etc/hosts %q has not the address of %q", hosts, addrs)
	}
	for what, path := range map[string]string{
		"a user namespace":      "/setns",
		"a neighbour":           "/dial?addr=" + ipOf(t, e.mustAsk(t, "two", "/addrs")) + ":8080",
		"cloud metadata":        "/dial?addr=169.254.169.254:80",
		"kernel settings":       "/write?path=/proc/sys/kernel/hostname&data=x",
		"IPv6 settings":         "/write?path=/proc/sys/net/ipv6/conf/eth0/disable_ipv6&data=0",
		"resolv.conf, bound in": "/write?path=/etc/resolv.conf&data=x",
		"a device":              "/read?path=/dev/kmsg",
	} {
		if out, err := e.ask(t, "one", path); err == nil {
			t.Errorf("%s is open to the container: %q", what, out)
		}
	}

	// What whoever reads the containerd socket can see.
	c, err := e.client.LoadContainer(e.ns(testContext(t)), "one")
	if err != nil {
		t.Fatal(err)
	}
	labels, err := c.Labels(e.ns(testContext(t)))
	if err != nil {
		t.Fatal(err)
	}
	if labels["containerd.io/restart.status"] != "" || labels[labelSession] != "one" {
		t.Errorf("the image's labels reached the container: %v", labels)
	}
	if strings.Contains(fmt.Sprint(labels), "s3cr3t") {
		t.Errorf("a secret is in the labels: %v", labels)
	}
	record := filepath.Join(e.sessionDir("one"), "spec.json")
	if fi, err := os.Stat(record); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%s: %v %v", record, fi.Mode(), err)
	}
	e.checkLimits(t, "one", spec.Resources)
	spec.Resources = runtime.Resources{CPUMillis: 1500, MemoryBytes: 200 << 20, PIDs: 99}
	e.mustEnsure(t, spec)
	e.checkLimits(t, "one", spec.Resources)
	spec.Resources = runtime.Resources{}
	e.mustEnsure(t, spec)
	e.checkLimits(t, "one", spec.Resources)
}

func (e *env) hostAddr(t testing.TB) string {
	t.Helper()
	return e.subnet.Addr().Next().String()
}

func ipOf(t testing.TB, addrs string) string {
	t.Helper()
	for line := range strings.Lines(addrs) {
		if ip, _, ok := strings.Cut(strings.TrimSpace(line), "/"); ok && strings.HasPrefix(ip, "10.") {
			return ip
		}
	}
	t.Fatalf("no address in %q", addrs)
	return ""
}

// checkLimits reads what the kernel has, on either cgroup version.
func (e *env) checkLimits(t *testing.T, session string, want runtime.Resources) {
	t.Helper()
	read := func(v1, v2 string) string {
		path := filepath.Join("/sys/fs/cgroup", filepath.Dir(v1), e.cgroupPath(session), filepath.Base(v1))
		if cgroupV2() {
			path = filepath.Join("/sys/fs/cgroup", e.cgroupPath(session), v2)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(data))
	}
	number := func(s string) int64 {
		n, err := strconv.ParseInt(strings.Fields(s)[0], 10, 64)
		if err != nil || n < 0 || n > 1<<60 {
			return 0 // "max" or -1
		}
		return n
	}
	got := runtime.Resources{
		CPUMillis:   number(read("cpu/cpu.cfs_quota_us", "cpu.max")) / 100,
		MemoryBytes: number(read("memory/memory.limit_in_bytes", "memory.max")),
		PIDs:        number(read("pids/pids.max", "pids.max")),
	}
	if got != want {
		t.Errorf("limits %+v, want %+v", got, want)
	}
}

func TestOOM(t *testing.T) {
	e := newEnv(t)
	e.importImage(t, testImage)
	ctx := testContext(t)
	for _, c := range []struct {
		word string
		code int
		oom  bool
	}{{"oom", 137, true}, {"oom-child", 3, false}} {
		spec := e.spec(c.word, c.word)
		spec.Resources.MemoryBytes = 32 << 20
		e.mustEnsure(t, spec)
		exit, err := e.Wait(ctx, c.word)
		if err != nil || exit.Code != c.code || exit.OOMKilled != c.oom {
			t.Errorf("%s: %+v %v", c.word, exit, err)
		}
	}
	// The same after a restart of the node daemon, which saw no event.
	again, err := New(ctx, e.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	exit, err := again.Wait(ctx, "oom")
	if err != nil || !exit.OOMKilled {
		t.Errorf("after a restart: %+v %v", exit, err)
	}
	// A kill that is ours is no OOM.
	spec := e.spec("killed", "serve", "8080")
	spec.Resources.MemoryBytes = 32 << 20
	inst := e.mustEnsure(t, spec)
	if err := unix.Kill(inst.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit, err := e.Wait(ctx, "killed"); err != nil || exit.Code != 137 || exit.OOMKilled {
		t.Errorf("killed: %+v %v", exit, err)
	}
}

func TestPIDLimit(t *testing.T) {
	e := newEnv(t)
	e.importImage(t, testImage)
	spec := e.spec("fork", "fork", "50")
	spec.Resources.PIDs = 30
	e.mustEnsure(t, spec)
	if _, err := e.Wait(testContext(t), "fork"); err != nil {
		t.Fatal(err)
	}
	for line, err := range logger.Read(testContext(t), spec.LogDir, logger.ReadOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(strings.TrimPrefix(line.Text, "children: "))
		if err != nil || n >= 30 {
			t.Errorf("%q with a limit of 30 processes", line.Text)
		}
		return
	}
	t.Error("nothing in the log")
}

func TestLogs(t *testing.T) {
	e := newEnv(t)
	e.importImage(t, testImage)
	spec := e.spec("talks", "print", "500")
	e.mustEnsure(t, spec)
	if _, err := e.Wait(testContext(t), "talks"); err != nil {
		t.Fatal(err)
	}
	// Stop waits for the logger, so nothing is on its way any more.
	if err := e.Stop(testContext(t), "talks", 0); err != nil {
		t.Fatal(err)
	}
	next := map[string]int{}
	for line, err := range logger.Read(testContext(t), spec.LogDir, logger.ReadOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("%s %d", strings.TrimPrefix(line.Stream, "std"), next[line.Stream])
		if line.Text != want {
			t.Fatalf("line %q, want %q", line.Text, want)
		}
		next[line.Stream]++
	}
	if next["stdout"] != 500 || next["stderr"] != 500 {
		t.Errorf("lines: %v", next)
	}
}

// TestVolume runs a container on a real volume: a limit that covers workspace
// and root file system, files with the session's ids, and what was installed
// survives the container.
func TestVolume(t *testing.T) {
	e := newEnv(t)
	e.importImage(t, testImage)
	ctx := testContext(t)
	m := &volume.Manager{Dir: filepath.Join(e.dir, "volumes")}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for _, s := range []string{"limited", "plain"} {
			if err := errors.Join(e.Kill(ctx, s), m.Remove(ctx, s)); err != nil {
				t.Error(err)
			}
		}
		if err := m.UnmountAll(ctx); err != nil {
			t.Error(err)
		}
	})
	for session, size := range map[string]int64{"limited": 64 << 20, "plain": 0} {
		v, err := m.Ensure(ctx, session, size)
		if err != nil {
			t.Fatal(err)
		}
		spec := e.spec(session, "serve", "8080")
		spec.IDBase, spec.ScratchDir = v.IDBase, v.ScratchDir
		spec.Mounts = []runtime.Mount{{Source: v.S3Dir, Destination: "/root/s3", Propagated: true}}
		e.mustEnsure(t, spec)
		e.mustAsk(t, session, "/write?path=/root/s3/work&data=w")
		e.mustAsk(t, session, "/write?path=/usr-installed&data=i")
		if st := e.mustAsk(t, session, "/stat?path=/root/s3"); st != "0 0 40755" {
			t.Errorf("%s: /root/s3 is %s", session, st)
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(v.S3Dir, "work"), &st); err != nil || st.Uid != v.IDBase {
			t.Errorf("%s: file outside: owner %d %v", session, st.Uid, err)
		}
		if size > 0 {
			for _, path := range []string{"/root/s3/big", "/big"} {
				if _, err := e.ask(t, session, "/fill?bytes=80000000&path="+path); err == nil || !strings.Contains(err.Error(), "no space left") {
					t.Errorf("%s: writing %s past the limit: %v", session, path, err)
				}
			}
		}

		// A folder mounted after the start appears inside.
		if size == 0 {
			late := filepath.Join(v.S3Dir, "late")
			if err := os.Mkdir(late, 0o755); err != nil {
				t.Fatal(err)
			}
			src := t.TempDir()
			if err := os.WriteFile(filepath.Join(src, "file"), []byte("late"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount(src, late, "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			if got := e.mustAsk(t, session, "/read?path=/root/s3/late/file"); got != "late" {
				t.Errorf("a late mount reads %q", got)
			}
			if err := unix.Unmount(late, 0); err != nil {
				t.Fatal(err)
			}
		}

		// So does what is mounted on the very folder that the container has, as long
		// as that was bare when the container was made; and again after it was replaced.
		if size == 0 {
			on := func(data string) {
				src := t.TempDir()
				if err := os.WriteFile(filepath.Join(src, "file"), []byte(data), 0o644); err != nil {
					t.Fatal(err)
				}
				if err := unix.Mount(src, v.RootDir, "", unix.MS_BIND, ""); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Mkdir(v.RootDir, 0o755); err != nil {
				t.Fatal(err)
			}
			rooted := spec
			rooted.Mounts = []runtime.Mount{{Source: v.RootDir, Destination: "/root/s3", Propagated: true}}
			if _, err := e.Ensure(ctx, rooted, &runtime.Hooks{Created: func(context.Context) error { on("first"); return nil }}); err != nil {
				t.Fatal(err)
			}
			if got := e.mustAsk(t, session, "/read?path=/root/s3/file"); got != "first" {
				t.Errorf("a mount on the container's own folder reads %q", got)
			}
			if err := unix.Unmount(v.RootDir, unix.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
			on("second")
			if got := e.mustAsk(t, session, "/read?path=/root/s3/file"); got != "second" {
				t.Errorf("the mount that replaced it reads %q", got)
			}
			if err := unix.Unmount(v.RootDir, 0); err != nil {
				t.Fatal(err)
			}
		}

		// Another environment makes another container on the same layer.
		spec.Env = map[string]string{"X": "1"}
		e.mustEnsure(t, spec)
		if got := e.mustAsk(t, session, "/read?path=/usr-installed"); got != "i" {
			t.Errorf("%s: after a new container %q", session, got)
		}
		if st := e.mustAsk(t, session, "/stat?path=/usr-installed"); st != "0 0 100644" {
			t.Errorf("%s: owner after a new container %s", session, st)
		}
	}
	// Another image does not get the old one's upper layer.
	v, err := m.Ensure(ctx, "plain", 0)
	if err != nil {
		t.Fatal(err)
	}
	e.importImage(t, "localhost/cloudcode/second:latest")
	spec := e.spec("plain", "serve", "8080")
	spec.IDBase, spec.ScratchDir, spec.Image = v.IDBase, v.ScratchDir, "localhost/cloudcode/second:latest"
	e.mustEnsure(t, spec)
	if got, err := e.ask(t, "plain", "/read?path=/usr-installed"); err == nil {
		t.Errorf("another image shows the first one's layer: %q", got)
	}
	if got := e.mustAsk(t, "plain", "/read?path=/etc/variant"); got != "localhost/cloudcode/second:latest" {
		t.Errorf("runs on %q", got)
	}
}

// fill writes until not one more block is free.
func fill(t *testing.T, dir string) {
	t.Helper()
	for i, n := range []int{1 << 30, 1 << 16, 4096, 4096, 1} {
		err := os.WriteFile(filepath.Join(dir, fmt.Sprint("fill", i)), make([]byte, n), 0o600)
		if i == 0 && !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("filling %s: %v", dir, err)
		}
	}
}

// TestFullDisk: a full machine says so, and a session that has filled its own
// disk can be started again, or nobody could clean it.
func TestFullDisk(t *testing.T) {
	needReal(t)
	ctx := testContext(t)
	m := &volume.Manager{Dir: filepath.Join(t.TempDir(), "volumes")}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := m.UnmountAll(ctx); err != nil {
			t.Error(err)
		}
	})
	machine, err := m.Ensure(ctx, "machine", 128<<20)
	if err != nil {
		t.Fatal(err)
	}
	v, err := m.Ensure(ctx, "session", volume.MinDiskBytes)
	if err != nil {
		t.Fatal(err)
	}
	e := newEnvIn(t, machine.S3Dir)
	e.importImage(t, testImage)

	spec := e.spec("full", "serve", "8080")
	spec.IDBase, spec.ScratchDir = v.IDBase, v.ScratchDir
	e.mustEnsure(t, spec)
	if _, err := e.ask(t, "full", "/fill?bytes=80000000&path=/big"); err == nil {
		t.Fatal("the limit does not hold")
	}
	if _, err := e.ask(t, "full", "/fill?bytes=4096&path=/big2"); err == nil {
		t.Fatal("the disk is not full")
	}
	for range 2 {
		if err := e.Kill(ctx, "full"); err != nil {
			t.Fatal(err)
		}
		e.mustEnsure(t, spec)
	}
	e.mustAsk(t, "full", "/")

	fill(t, machine.S3Dir)
	other := e.spec("other", "serve", "8080")
	if _, err := e.Ensure(ctx, other, nil); !errors.Is(err, runtime.ErrNoSpace) {
		t.Errorf("Ensure on a full machine: %v", err)
	}
	f, err := os.Open(runtimetest.Archive(t, runtimetest.Image(t, "large"), "localhost/more:v1"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := e.ImportImage(ctx, f, "", nil); !errors.Is(err, runtime.ErrNoSpace) {
		t.Errorf("ImportImage on a full machine: %v", err)
	}
	// It can still be cleaned.
	if err := e.Kill(ctx, "full"); err != nil {
		t.Errorf("Kill on a full machine: %v", err)
	}
	for i := range 5 {
		if err := os.Remove(filepath.Join(machine.S3Dir, fmt.Sprint("fill", i))); err != nil {
			t.Fatal(err)
		}
	}
	e.mustEnsure(t, other)
}
