package image

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// needReal skips what takes minutes, root and a Debian mirror, unless the run asks for it; then
// anything missing fails.
func needReal(t *testing.T) {
	t.Helper()
	if os.Getenv("CLOUDCODE_REQUIRE_REAL") != "1" {
		t.Skip("set CLOUDCODE_REQUIRE_REAL=1 to build the real image twice: two minutes, root, mmdebstrap, npm")
	}
}

// TestRealImage builds twice with nothing shared, compares digests, and tries the result.
func TestRealImage(t *testing.T) {
	needReal(t)
	build := func(dir string) Result {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
		defer cancel()
		r, err := Build(ctx, BuildOptions{CacheDir: dir, Progress: func(p Progress) {
			if p.Done {
				t.Logf("%6.1fs %s: %s", p.Elapsed.Seconds(), p.Phase, p.Line)
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	// One cache that apt's own user can enter, one that it cannot: it must not show.
	dir := t.TempDir()
	open, closed := filepath.Join(dir, "open"), filepath.Join(dir, "closed", "cache")
	for path, mode := range map[string]os.FileMode{filepath.Dir(dir): 0o755, dir: 0o755, filepath.Dir(closed): 0o700} {
		if err := errors.Join(os.MkdirAll(path, mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	one := build(open)
	defer syscall.Umask(syscall.Umask(0o077))
	t.Setenv("TZ", "Asia/Tokyo")
	t.Setenv("LANG", "de_DE.UTF-8")
	two := build(closed)
	if one.Digest != two.Digest {
		t.Errorf("two builds, two digests: %s and %s", one.Digest, two.Digest)
	}
	for i, l := range one.Layers {
		t.Logf("%s: %s, %d MB, unpacked %d MB, %s", l.Name, l.Digest, l.Size/1e6, l.Unpacked/1e6, l.Took)
		if l.Digest != two.Layers[i].Digest {
			t.Errorf("the second build's %s is %s", l.Name, two.Layers[i].Digest)
		}
	}
	again := build(open)
	if !again.Cached || again.Digest != one.Digest || again.Took > 5*time.Second {
		t.Errorf("the third build was not served from the cache: %+v", again)
	}
	checkArchive(t, one)
	root := filepath.Join(dir, "root")
	unpack(t, open, root)
	tryImage(t, root)
}

func unpack(t *testing.T, cacheDir, root string) {
	t.Helper()
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	c := cache{dir: cacheDir}
	files, err := filesKey()
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{baseKey(BuildOptions{}), toolsKey(), files} {
		r, err := c.layer(key).Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "tar", "-x", "-p", "--numeric-owner", "-C", root)
		cmd.Stdin = r
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("unpack: %v\n%s", err, out)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// tryImage starts the entrypoint in namespaces of its own, with no network but loopback, and looks
// whether OpenCode answers and the tools run.
func tryImage(t *testing.T, root string) {
	t.Helper()
	const outside = `set -eu
root=$1
shift
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/dev"
for d in null zero random urandom; do : > "$root/dev/$d"; mount --bind "/dev/$d" "$root/dev/$d"; done
exec chroot "$root" /usr/bin/env -i "$@"`
	const inside = `set -eu
cd "$HOME"
ip link set lo up
/usr/bin/tini -s -- cloudcode-entrypoint & server=$!
for i in $(seq 100); do
	health=$(curl -s -m 0.25 http://127.0.0.1:2633/global/health) && break
	kill -0 $server || exit 1
	sleep 0.1
done
echo "health $health"
echo "config $(curl -s -m 20 http://127.0.0.1:2633/config)"
echo "node $(node --version) npm $(npm --version) npx $(npx --version)"
python3 -m venv /tmp/venv && echo "venv $(/tmp/venv/bin/pip --version)"
echo "python $(python --version)"
pip --version
git init -q /tmp/repo && cd /tmp/repo && touch a && git add a && git commit -q -m first && echo "git $(git log --format=%an)"
echo "rg $(printf 'x\nneedle\n' | rg -c needle)"
echo "apt $(apt-get --version | head -n 1)"
for tool in curl file jq less make patch ps ssh ss tini unzip xz zip; do command -v "$tool" >/dev/null || { echo "no $tool"; exit 1; }; done
kill $server
wait $server || true
`
	args := []string{"--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child", "sh", "-c", outside, "sh", root}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	args = append(args, Env()...)
	args = append(args, "/bin/sh", "-c", inside)
	cmd := exec.CommandContext(ctx, "unshare", args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("in the image: %v\n%s", err, &out)
	}
	for _, want := range []string{
		`health {"healthy":true,"version":"` + OpenCodeVersion + `"}`,
		`"permission":{"*":"allow"}`,
		"node v" + NodeVersion + " npm " + NPMVersion + " npx " + NPMVersion,
		"python Python 3.13.", "venv pip ", "git OpenCode", "rg 1\n", "apt apt ",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
	t.Log(out.String())
}
