package containerd

import (
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/containerd/logger"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/runtimetest"
)

func TestMain(m *testing.M) {
	// This program is also the container-log helper of the containers it makes.
	if len(os.Args) == 3 && os.Args[1] == "container-log" {
		if err := logger.Main(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// needReal skips on machines without root; CLOUDCODE_REQUIRE_REAL=1 makes that a failure.
func needReal(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
		t.Fatal("containers need root")
	}
	t.Skip("containers need root")
}

func libexecDir(t testing.TB) string {
	t.Helper()
	if d := os.Getenv("CLOUDCODE_LIBEXEC_DIR"); d != "" {
		return d
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, "libexec", "cloudcode")
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("no go.mod above the test")
		}
		dir = filepath.Dir(dir)
	}
}

// env is one private containerd with a runtime on it.
type env struct {
	*Runtime
	daemon *Daemon
	cfg    Config
	dir    string
}

func testLogger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// unique names this test's bridge and subnet: other packages' tests run at the
// same time.
func unique(t testing.TB) (bridge, subnet string) {
	n := hash(fmt.Sprint(os.Getpid(), t.Name(), envs.Add(1)))
	return fmt.Sprintf("cct%08x", n), fmt.Sprintf("10.%d.%d.0/24", 210+n>>16%40, n&0xff)
}

// envs counts, so that one test may have several.
var envs atomic.Int32

func testNamespace(t testing.TB) string {
	return fmt.Sprintf("cct%08x", hash(fmt.Sprint(os.Getpid(), t.Name())))
}

func hash(s string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s))
	return h.Sum32()
}

func newEnv(t testing.TB) *env {
	t.Helper()
	needReal(t)
	return newEnvIn(t, t.TempDir())
}

func newEnvIn(t testing.TB, dir string) *env {
	t.Helper()
	ctx := testContext(t)
	d, err := StartDaemon(ctx, DaemonConfig{BinDir: libexecDir(t), Dir: filepath.Join(dir, "containerd"), Logger: testLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	bridge, subnet := unique(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	e := &env{daemon: d, dir: dir, cfg: Config{
		Address: d.Address(), Namespace: testNamespace(t), StateDir: filepath.Join(dir, "state"),
		CNIBinDir: filepath.Join(libexecDir(t), "cni"), BridgeName: bridge, Subnet: subnet,
		LogBinary: []string{self, "container-log"}, Logger: testLogger(t),
	}}
	if e.Runtime, err = New(ctx, e.cfg); err != nil {
		t.Error(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if e.Runtime != nil {
			list, err := e.List(ctx)
			if err != nil {
				t.Error(err)
			}
			for _, i := range list {
				if err := e.Kill(ctx, i.Session); err != nil {
					t.Error(err)
				}
			}
			if err := e.Cleanup(ctx); err != nil {
				t.Error(err)
			}
			_ = e.Close()
		}
		pid := d.PID()
		if err := d.Stop(ctx); err != nil {
			t.Error(err)
		}
		checkNothingLeft(t, e, pid)
		if t.Failed() {
			t.Logf("containerd's log:\n%s", lastLines(d.LogFile(), 30))
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	return e
}

// importImage brings the test image in under ref.
func (e *env) importImage(t testing.TB, ref string) {
	t.Helper()
	f, err := os.Open(runtimetest.Archive(t, runtimetest.Image(t, ref), ref))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := e.ImportImage(testContext(t), f, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(img.Name, ref) {
		t.Fatalf("imported as %q, want %q", img.Name, ref)
	}
}
