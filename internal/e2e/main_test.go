//go:build e2e

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/image"
	"github.com/cloudcode-dev/cloudcode/internal/container"
)

const (
	projectDir = container.ProjectDir
	user       = "alice"
	password   = "correct horse: battery/staple?" // what URLs and shells may stumble over
)

// work is what all tests share.
var work struct {
	repo       string // folder of go.mod
	libexec    string
	cache      string
	dir        string // of this run; removed at its end
	keep       string // where to leave logs and screenshots; may be empty
	bin        string // cloudcode, freshly built
	fleets     []*fleet
	stores     []*store
	interfaces []string
	why        string // why the tests cannot run here; empty if they can
}

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	before := machineNow()
	code := m.Run()
	errs := []error{endFleets()}
	for _, s := range work.stores {
		s.stop()
	}
	for _, name := range work.interfaces {
		errs = append(errs, exec.Command("ip", "link", "del", name).Run())
	}
	if sharedModel.model != nil {
		sharedModel.model.close()
	}
	// Everything of this run, whatever test made it.
	errs = append(errs, machineNow().since(before), os.RemoveAll(work.dir), goleak.Find())
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: after the tests:", err)
		return 1
	}
	return code
}

func prepare() (err error) {
	if work.repo, err = os.Getwd(); err != nil {
		return err
	}
	for {
		if _, err := os.Stat(filepath.Join(work.repo, "go.mod")); err == nil {
			break
		}
		if work.repo == filepath.Dir(work.repo) {
			return errors.New("no go.mod above the tests")
		}
		work.repo = filepath.Dir(work.repo)
	}
	if work.libexec = os.Getenv("CLOUDCODE_LIBEXEC_DIR"); work.libexec == "" {
		work.libexec = filepath.Join(work.repo, "libexec", "cloudcode")
	}
	if work.cache = os.Getenv("CLOUDCODE_E2E_CACHE"); work.cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return err
		}
		work.cache = filepath.Join(dir, "cloudcode")
	}
	switch {
	case os.Geteuid() != 0:
		work.why = "containers need root"
	case exec.Command(filepath.Join(work.libexec, "containerd"), "--version").Run() != nil:
		work.why = "no containerd in " + work.libexec + " (make deps-test)"
	}
	if work.keep = os.Getenv("CLOUDCODE_E2E_KEEP"); work.keep != "" {
		if err := os.MkdirAll(work.keep, 0o755); err != nil {
			return err
		}
	}
	// Short: sockets lie below it.
	if work.dir, err = os.MkdirTemp("", "cce2e"); err != nil || work.why != "" {
		return err
	}
	work.bin = filepath.Join(work.dir, "cloudcode")
	build := exec.Command("go", "build", "-o", work.bin, "./cmd/cloudcode")
	build.Dir, build.Env = work.repo, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	return nil
}

// needReal skips where containers cannot run, or fails if they must.
func needReal(tb testing.TB, programs ...string) {
	tb.Helper()
	why := work.why
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			why = p + " is not installed"
		}
	}
	switch {
	case why == "":
	case os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1":
		tb.Fatal(why)
	default:
		tb.Skip(why)
	}
}

// sessionImage builds the image, or finds it in the cache.
var sessionImage = sync.OnceValues(func() (image.Result, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	return image.Build(ctx, image.BuildOptions{
		CacheDir: imageCache(),
		Progress: func(p image.Progress) {
			if p.Done && p.Elapsed > time.Second {
				fmt.Printf("    image: %s done after %v\n", p.Phase, p.Elapsed.Round(time.Second))
			}
		},
	})
})

func imageCache() string { return filepath.Join(work.cache, "image") }

// nodeModules installs the clients that testdata/package.json pins, once per
// lock file, and returns their folder.
func nodeModules(tb testing.TB) string {
	tb.Helper()
	needReal(tb, "node", "npm")
	dir, err := installNodeModules()
	if err != nil {
		tb.Fatal(err)
	}
	return dir
}

var installNodeModules = sync.OnceValues(func() (string, error) {
	files := map[string][]byte{}
	sum := sha256.New()
	for _, name := range []string{"package.json", "package-lock.json"} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			return "", err
		}
		files[name] = data
		sum.Write(data)
	}
	parent := filepath.Join(work.cache, "e2e-npm")
	dir := filepath.Join(parent, hex.EncodeToString(sum.Sum(nil)[:8]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	lock, err := os.Create(dir + ".lock")
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	modules, done := filepath.Join(dir, "node_modules"), filepath.Join(dir, "done")
	if _, err := os.Stat(done); err == nil {
		return modules, nil
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return "", err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	npm := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	npm.Dir = dir
	npm.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	npm.Cancel = func() error { return syscall.Kill(-npm.Process.Pid, syscall.SIGKILL) }
	if out, err := npm.CombinedOutput(); err != nil {
		return "", fmt.Errorf("npm ci: %w\n%s", err, out)
	}
	return modules, os.WriteFile(done, nil, 0o644)
})
