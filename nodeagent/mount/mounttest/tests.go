package mounttest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/mountinfo"
)

func testFiles(e *env) {
	e.took("Mount", func() error { return e.m.Mount(e.ctx, e.spec) })
	e.must(e.m.Probe(e.ctx, e.spec.ID))
	e.write("a/b/file", "one")
	e.write("renamed-from", "two")
	e.must(os.Rename(e.path("renamed-from"), e.path("a/renamed")))
	e.write("removed", "three")
	e.must(os.Remove(e.path("removed")))
	e.write("empty", "")
	e.write("odd näme #1 %41+", "four")
	e.write("appended", "five")
	f, err := os.OpenFile(e.path("appended"), os.O_APPEND|os.O_WRONLY, 0)
	e.must(err)
	_, err = io.WriteString(f, " and six")
	e.must(err)
	e.must(f.Close())
	e.write("rewritten", "a long content")
	e.write("rewritten", "short")
	large := strings.Repeat("0123456789abcdef", 24<<20/16)
	e.write("large", large)

	want := map[string]string{
		"a/b/file": "one", "a/renamed": "two", "empty": "", "odd näme #1 %41+": "four",
		"appended": "five and six", "rewritten": "short", "large": large,
	}
	check := func() {
		e.Helper()
		for name, content := range want {
			if got := e.read(name); got != content {
				e.Fatalf("%s: %d bytes read, %d written", name, len(got), len(content))
			}
		}
		for _, name := range []string{"removed", "renamed-from"} {
			if _, err := os.Stat(e.path(name)); !errors.Is(err, fs.ErrNotExist) {
				e.Fatalf("%s is there: %v", name, err)
			}
		}
	}
	check()
	fi, err := os.Stat(e.spec.Point)
	e.must(err)
	if st := fi.Sys().(*syscall.Stat_t); st.Uid != testUID || st.Gid != testGID {
		e.Errorf("the mount belongs to %d:%d", st.Uid, st.Gid)
	}
	if e.suite.Perms {
		e.write("script", "#!/bin/sh")
		e.must(os.Chmod(e.path("script"), 0o755))
		if fi, err := os.Stat(e.path("script")); err != nil || fi.Mode().Perm() != 0o755 {
			e.Errorf("after chmod: %v, %v", fi, err)
		}
	}

	e.took("Sync", func() error { return e.m.Sync(e.ctx, e.spec.ID) })
	e.wantObjects(want)
	if _, ok := e.objects()["removed"]; ok {
		e.Error("a removed file is in the bucket")
	}
	e.took("Sync of nothing new", func() error { return e.m.Sync(e.ctx, e.spec.ID) })
	e.took("Probe", func() error { return e.m.Probe(e.ctx, e.spec.ID) })
	e.took("Unmount", func() error { return e.m.Unmount(e.ctx, e.spec.ID) })
	e.mount()
	check()
}

func testOpenFile(e *env) {
	e.mount()
	f := e.create("open")
	defer f.Close()
	_, err := f.WriteString("one")
	e.must(err)
	err = e.short(5*time.Second, func(ctx context.Context) error { return e.m.Sync(ctx, e.spec.ID) })
	if e.suite.OpenFiles {
		e.must(err)
		e.wantObjects(map[string]string{"open": "one"})
	} else {
		e.wantErr(err, mount.ErrNotFlushed, "open")
	}
	// Somebody who never stops writing must not keep Sync from its end.
	if e.suite.OpenFiles {
		ctx, cancel := context.WithCancel(e.ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for ctx.Err() == nil {
				_, _ = f.WriteAt([]byte("two"), 0) // fails only if the mount does, which Sync says
			}
		}()
		err := e.short(20*time.Second, func(ctx context.Context) error { return e.m.Sync(ctx, e.spec.ID) })
		cancel()
		<-done
		e.must(err)
	}
	finish(e, f, "!")
	e.must(e.m.Unmount(e.ctx, e.spec.ID))
}

func testManyFiles(e *env) {
	e.mount()
	want := map[string]string{}
	for i := range 1000 {
		want[fmt.Sprintf("dir-%d/file-%d", i%7, i)] = fmt.Sprint("content of ", i)
	}
	for name, content := range want {
		e.write(name, content)
	}
	e.took("Sync of 1000 files", func() error { return e.m.Sync(e.ctx, e.spec.ID) })
	e.wantObjects(want)
}

func testUnmountWaits(e *env) {
	e.mount()
	pid := e.pid()
	want := map[string]string{"large": strings.Repeat("x", 16<<20)}
	for i := range 200 {
		want[fmt.Sprintf("dir/file-%d", i)] = fmt.Sprint("content of ", i)
	}
	for name, content := range want {
		e.write(name, content)
	}
	e.must(e.m.Unmount(e.ctx, e.spec.ID))
	e.wantObjects(want)
	if alive(pid) {
		e.Error("the mounter still runs after Unmount")
	}
	e.wantErr(e.m.Probe(e.ctx, e.spec.ID), mount.ErrNotFound)
	at, err := mountinfo.At(e.spec.Point)
	e.must(err)
	if len(at) != 0 {
		e.Errorf("still mounted: %+v", at)
	}
}

func testAdoption(e *env) {
	e.mount()
	pid := e.pid()
	e.write("file", "one")
	f, err := os.Create(e.path("open"))
	e.must(err)
	defer f.Close()
	for range 2 {
		e.restart()
		if got := e.pid(); got != pid {
			e.Fatalf("after a restart the mounter is %d, was %d", got, pid)
		}
		e.must(e.m.Probe(e.ctx, e.spec.ID))
		e.mount()
		if got := e.pid(); got != pid {
			e.Fatalf("the mounter was not adopted: %d, was %d", got, pid)
		}
	}
	_, err = f.WriteString("two")
	e.must(err)
	e.must(f.Close())
	e.must(e.m.Unmount(e.ctx, e.spec.ID))
	e.wantObjects(map[string]string{"file": "one", "open": "two"})
	if alive(pid) {
		e.Error("an adopted mounter still runs after Unmount")
	}
}

func testAnotherSpec(e *env) {
	e.mount()
	pid := e.pid()
	e.write("file", "one")
	e.restart()
	first := e.spec
	e.spec.Prefix = "root/session-2"
	e.mount()
	if alive(pid) {
		e.Error("the mounter of the old spec still runs")
	}
	e.wantObjects(map[string]string{"file": "one"})
	if _, err := os.Stat(e.path("file")); !errors.Is(err, fs.ErrNotExist) {
		e.Errorf("the old prefix is still mounted: %v", err)
	}
	// The same folder with other keys is another mount too.
	pid = e.pid()
	e.spec.SecretAccessKey = "some-other-key"
	e.wantErr(e.m.Mount(e.ctx, e.spec), mount.ErrFailed)
	if alive(pid) {
		e.Error("a mounter with keys that were replaced still runs")
	}
	e.spec = first
}

func testKilled(e *env) {
	e.mount()
	e.write("synced", "one")
	e.must(e.m.Sync(e.ctx, e.spec.ID))
	pid := e.pid()
	closed := e.create("closed")
	e.s3.Pause()
	e.Cleanup(e.s3.Resume)
	finish(e, closed, "two")
	if e.suite.KeptUnwritten != nil {
		e.eventually("the file is kept on disk", func() error { return e.suite.KeptUnwritten(e.spec.CacheDir, "closed") })
	}
	e.kill(pid, syscall.SIGKILL)
	e.s3.Resume()
	e.eventually("the mounter is dead", func() error {
		if err := e.m.Probe(e.ctx, e.spec.ID); !errors.Is(err, mount.ErrDead) {
			return fmt.Errorf("the probe says %v", err)
		}
		return nil
	})
	// Its file system may be dead before its last thread is.
	e.eventually("the process is gone", func() error {
		all, err := e.m.List(e.ctx)
		if err != nil || len(all) != 1 || all[0].PID != 0 {
			return fmt.Errorf("the list of a dead mount: %+v, %w", all, err)
		}
		return nil
	})
	e.wantErr(e.m.Sync(e.ctx, e.spec.ID), mount.ErrNotFlushed)
	e.wantErr(e.m.Unmount(e.ctx, e.spec.ID), mount.ErrNotFlushed)
	if _, err := os.Stat(e.spec.Point); !errors.Is(err, syscall.ENOTCONN) {
		e.Errorf("a dead mount that could not be flushed is not there any more: %v", err)
	}
	e.must(e.remount())
	if got := e.read("synced"); got != "one" {
		e.Errorf("after healing: %q", got)
	}
	if e.suite.KeptUnwritten != nil {
		if got := e.read("closed"); got != "two" {
			e.Errorf("after healing: %q", got)
		}
	}
	e.write("after", "three")
	e.must(e.m.Unmount(e.ctx, e.spec.ID))
	want := map[string]string{"synced": "one", "after": "three"}
	if e.suite.KeptUnwritten != nil {
		want["closed"] = "two"
	}
	e.wantObjects(want)
}

func (e *env) remount() error {
	if r, ok := e.m.(mount.Remounter); ok {
		return r.Remount(e.ctx, e.spec)
	}
	return e.m.Mount(e.ctx, e.spec)
}

func testHung(e *env) {
	e.mount()
	e.write("synced", "one")
	e.must(e.m.Sync(e.ctx, e.spec.ID))
	pid := e.pid()
	e.kill(pid, syscall.SIGSTOP)
	for range 2 {
		err := e.short(ProbeTimeout+time.Second, func(ctx context.Context) error { return e.m.Probe(ctx, e.spec.ID) })
		e.wantErr(err, mount.ErrHung)
	}
	err := e.short(time.Second, func(ctx context.Context) error { return e.m.Sync(ctx, e.spec.ID) })
	e.wantErr(err, mount.ErrNotFlushed)
	err = e.short(time.Second, func(ctx context.Context) error { return e.m.Unmount(ctx, e.spec.ID) })
	e.wantErr(err, mount.ErrNotFlushed)
	// One that recovers is fine again, and may be written to.
	e.kill(pid, syscall.SIGCONT)
	e.must(e.m.Probe(e.ctx, e.spec.ID))
	e.write("again", "two")
	e.must(e.m.Sync(e.ctx, e.spec.ID))

	e.kill(pid, syscall.SIGSTOP)
	e.wantErr(e.m.Probe(e.ctx, e.spec.ID), mount.ErrHung)
	e.must(e.remount())
	if alive(pid) {
		e.Error("the hung mounter is still there")
	}
	if got := e.read("synced"); got != "one" {
		e.Errorf("after healing: %q", got)
	}
	e.must(e.m.Probe(e.ctx, e.spec.ID))
}

// ProbeTimeout that Suite.New must set, so that tests of hung mounts are short.
const ProbeTimeout = 2 * time.Second

func testAbandon(e *env) {
	e.mount()
	e.write("synced", "one")
	e.must(e.m.Sync(e.ctx, e.spec.ID))
	pid := e.pid()
	open, err := os.Create(e.path("open"))
	e.must(err)
	defer open.Close()
	_, err = open.WriteString("two")
	e.must(err)
	// More than can be uploaded by now.
	for i := range 300 {
		e.write(fmt.Sprintf("closed-%d", i), "three")
	}
	start := time.Now()
	e.must(e.m.Abandon(e.ctx, e.spec.ID))
	if took := time.Since(start); took > 2*time.Second {
		e.Errorf("Abandon took %v", took)
	}
	// A request that was under way may end after its client's death; none begins.
	var before map[string]string
	e.within(5*time.Second, "requests under way have ended", func() error {
		last := before
		before = e.objects()
		if last == nil || !maps.Equal(last, before) {
			return errors.New("objects still change")
		}
		return nil
	})
	if alive(pid) {
		e.Error("the mounter still runs after Abandon")
	}
	e.wantErr(e.m.Probe(e.ctx, e.spec.ID), mount.ErrNotFound)
	if entries, err := os.ReadDir(e.spec.Point); err != nil || len(entries) != 0 {
		e.Errorf("the folder after Abandon: %v, %v", entries, err)
	}
	e.must(e.m.Abandon(e.ctx, e.spec.ID))

	// Not by a later mount either, whose owner may be another by then.
	e.mount()
	e.write("later", "four")
	e.must(e.m.Unmount(e.ctx, e.spec.ID))
	before["later"] = "four"
	if now := e.objects(); !maps.Equal(before, now) {
		e.Errorf("abandoned files were written: before %d objects, now %d", len(before), len(now))
	}
	if _, ok := before["open"]; ok {
		e.Error("an open file was written")
	}
}

func testBusy(e *env) {
	e.mount()
	f, err := os.Create(e.path("open"))
	e.must(err)
	defer f.Close()
	_, err = f.WriteString("one")
	e.must(err)
	e.wantErr(e.m.Unmount(e.ctx, e.spec.ID), mount.ErrBusy)
	e.write("other", "two") // it is as before
	_, err = f.WriteString(" two")
	e.must(err)
	e.must(f.Close())

	// A copy of the mount elsewhere would keep the mounter alive.
	e.must(os.Mkdir(filepath.Join(e.dir, "..", "copy"), 0o755))
	to := filepath.Join(filepath.Dir(e.dir), "copy")
	e.must(mount.Attach(e.ctx, e.spec.Point, to))
	e.wantErr(e.m.Unmount(e.ctx, e.spec.ID), mount.ErrBusy, to)
	e.must(mount.Detach(to))

	dir, err := os.Open(e.spec.Point)
	e.must(err)
	e.wantErr(e.m.Unmount(e.ctx, e.spec.ID), mount.ErrBusy)
	e.write("third", "three")
	e.must(dir.Close())
	e.must(e.m.Unmount(e.ctx, e.spec.ID))
	e.wantObjects(map[string]string{"open": "one two", "other": "two", "third": "three"})
}

func testSecrets(e *env) {
	e.mount()
	pid := e.pid()
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	e.must(err)
	hidden := []string{e.spec.SecretAccessKey, e.spec.AccessKeyID}
	for _, secret := range hidden {
		if strings.Contains(string(cmdline), secret) {
			e.Errorf("a key is among the arguments: %q", cmdline)
		}
	}
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	e.must(err)
	if !strings.Contains(string(environ), e.spec.SecretAccessKey) {
		e.Error("the key is not in the environment: where is it?")
	}
	for _, name := range []string{"USER", "CLOUDCODE_REQUIRE_REAL", "GOPATH"} {
		if strings.Contains("\x00"+string(environ), "\x00"+name+"=") {
			e.Errorf("our own variable %s is in the mounter's environment", name)
		}
	}
	if fi, err := os.Stat(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || fi.Mode().Perm() != 0o400 || fi.Sys().(*syscall.Stat_t).Uid != 0 {
		e.Errorf("others may read the mounter's environment: %v %v", fi, err)
	}
	e.write("file", "one")
	e.must(e.m.Sync(e.ctx, e.spec.ID))
	if fi, err := os.Stat(e.dir); err != nil || fi.Mode().Perm() != 0o700 {
		e.Errorf("the state folder: %v, %v", fi, err)
	}
	if fi, err := os.Stat(e.spec.LogPath); err != nil || fi.Mode().Perm() != 0o600 {
		e.Errorf("the log: %v, %v", fi, err)
	}
	files := []string{e.spec.LogPath}
	e.must(filepath.WalkDir(e.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, path)
		}
		return err
	}))
	for _, path := range files {
		data, err := os.ReadFile(path)
		e.must(err)
		if strings.Contains(string(data), e.spec.SecretAccessKey) {
			e.Errorf("the secret key is in %s", path)
		}
	}
}

func testRefusals(e *env) {
	try := func(class error, change func(*mount.Spec), words ...string) {
		e.Helper()
		s := e.spec
		change(&s)
		err := e.short(40*time.Second, func(ctx context.Context) error { return e.m.Mount(ctx, s) })
		e.wantErr(err, class, words...)
		e.wantErr(e.m.Probe(e.ctx, s.ID), mount.ErrNotFound)
	}
	try(mount.ErrFailed, func(s *mount.Spec) { s.SecretAccessKey = "wrong-secret-key" }, "key")
	try(mount.ErrFailed, func(s *mount.Spec) { s.AccessKeyID = "AKIDUNKNOWN" }, "key")
	try(mount.ErrFailed, func(s *mount.Spec) { s.Bucket = "there-is-no-such-bucket" }, "there-is-no-such-bucket")
	try(mount.ErrFailed, func(s *mount.Spec) { s.Endpoint = "http://127.0.0.1:1" }, "127.0.0.1:1")
	try(mount.ErrInvalid, func(s *mount.Spec) { s.Args = "--no-such-flag" }, "--no-such-flag")
	try(mount.ErrInvalid, func(s *mount.Spec) { s.Args = "/etc" }, "/etc")
	try(mount.ErrInvalid, func(s *mount.Spec) { s.Args = "--log-file /etc/passwd" }, "--log-file")
	try(mount.ErrInvalid, func(s *mount.Spec) { s.Args = "'" }, "quote")
	try(mount.ErrInvalid, func(s *mount.Spec) { s.Prefix = "-x" })
	try(mount.ErrInvalid, func(s *mount.Spec) { s.Endpoint = "-x" })
	try(mount.ErrInvalid, func(s *mount.Spec) { s.Point = "relative" })
	try(mount.ErrInvalid, func(s *mount.Spec) { s.CacheDir = "relative" }, "relative")
	try(mount.ErrInvalid, func(s *mount.Spec) { s.PublicOnly = true }, "--own-storage=any")
	s := e.spec
	s.ID = "../x"
	e.wantErr(e.m.Mount(e.ctx, s), mount.ErrInvalid)

	// Over somebody else's mount.
	other := filepath.Join(e.TempDir(), "other")
	e.must(os.MkdirAll(e.spec.Point, 0o755))
	e.must(os.MkdirAll(other, 0o755))
	e.must(mount.Attach(e.ctx, other, e.spec.Point))
	try(mount.ErrFailed, func(*mount.Spec) {}, "not ours")
	e.must(mount.Detach(e.spec.Point))
	e.mount()
}

func testNotMounted(e *env) {
	const id = "never-mounted"
	e.wantErr(e.m.Probe(e.ctx, id), mount.ErrNotFound)
	e.wantErr(e.m.Sync(e.ctx, id), mount.ErrNotFound)
	e.must(e.m.Unmount(e.ctx, id))
	e.must(e.m.Abandon(e.ctx, id))
	all, err := e.m.List(e.ctx)
	e.must(err)
	if len(all) != 0 {
		e.Errorf("List: %+v", all)
	}
	v, err := e.m.Version(e.ctx)
	if err != nil || v == "" {
		e.Errorf("Version: %q, %v", v, err)
	}
	e.Logf("%s %s", e.m.Name(), v)
}

// What these tests do in this process with the mount must not need the object
// store: a thread that waits for it could not be killed. So the files are open
// before it goes away.
func testStoreAway(e *env) {
	e.mount()
	e.write("before", "one")
	e.must(e.m.Sync(e.ctx, e.spec.ID))
	one, two := e.create("during"), e.create("during-2")
	defer one.Close()
	defer two.Close()
	e.s3.Kill()
	finish(e, one, "two")
	// The mount is well: it must not be taken for hung, and killed with what it has.
	e.must(e.m.Probe(e.ctx, e.spec.ID))
	err := e.short(5*time.Second, func(ctx context.Context) error { return e.m.Sync(ctx, e.spec.ID) })
	e.wantErr(err, mount.ErrNotFlushed, "during")
	e.wantErr(e.m.Unmount(e.ctx, e.spec.ID), mount.ErrBusy) // the other one is open
	finish(e, two, "three")
	err = e.short(5*time.Second, func(ctx context.Context) error { return e.m.Unmount(ctx, e.spec.ID) })
	e.wantErr(err, mount.ErrNotFlushed, "during")
	e.Logf("Unmount says: %v", err)
	e.must(e.m.Probe(e.ctx, e.spec.ID))
	e.s3.Start()
	e.within(e.suite.Recovers, "what was written during the outage arrives", func() error {
		got := e.objects()
		if got["during"] != "two" || got["during-2"] != "three" {
			return fmt.Errorf("in the bucket: %q", keys(got))
		}
		return nil
	})
	e.write("after", "four") // the failed Unmount left it writable
	e.must(e.m.Unmount(e.ctx, e.spec.ID))
	e.wantObjects(map[string]string{"before": "one", "during": "two", "during-2": "three", "after": "four"})
}

func (e *env) create(name string) *os.File {
	e.Helper()
	f, err := os.Create(e.path(name))
	e.must(err)
	return f
}

func finish(e *env, f *os.File, content string) {
	e.Helper()
	_, err := f.WriteString(content)
	e.must(err)
	e.must(f.Close())
}

func testStoreHangs(e *env) {
	e.mount()
	e.write("before", "one")
	e.must(e.m.Sync(e.ctx, e.spec.ID))
	f := e.create("during")
	defer f.Close()
	e.s3.Pause()
	e.Cleanup(e.s3.Resume)
	finish(e, f, "two")
	err := e.short(3*time.Second, func(ctx context.Context) error { return e.m.Unmount(ctx, e.spec.ID) })
	e.wantErr(err, mount.ErrNotFlushed)
	e.must(e.m.Probe(e.ctx, e.spec.ID))
	// Also with somebody waiting for a listing.
	ls := exec.Command("ls", e.path("never-seen"))
	e.must(ls.Start())
	for range 3 {
		e.must(e.m.Probe(e.ctx, e.spec.ID))
	}
	e.s3.Resume()
	_ = ls.Wait() // it is not there
	e.must(e.m.Unmount(e.ctx, e.spec.ID))
	e.wantObjects(map[string]string{"before": "one", "during": "two"})
}

// testRepository: git makes names that are renamed before they ever were objects.
// That does not keep the mount from being flushed.
func testRepository(e *env) {
	if _, err := exec.LookPath("git"); err != nil {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			e.Fatal(err)
		}
		e.Skip(err)
	}
	e.mount()
	git := exec.CommandContext(e.ctx, "sh", "-ec", `git init -q repo; cd repo
git config user.name agent; git config user.email agent@example.com; git config gc.auto 0
for i in 1 2 3 4 5; do echo "line $i" >> README; mkdir -p src/$i; seq $((i*1000)) > src/$i/numbers; git add -A; git commit -qm "commit $i"; done
git checkout -q -b feature; echo feature > feature; git add feature; git commit -qm feature; git checkout -q -; git tag v1`)
	git.Dir = e.spec.Point
	git.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*")
	if out, err := git.CombinedOutput(); err != nil {
		e.Fatalf("git: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(e.ctx, time.Minute)
	defer cancel()
	err := e.m.Unmount(ctx, e.spec.ID)
	if removals, ok := errors.AsType[*mount.RemovalsLeftError](err); ok {
		for _, name := range removals.Names {
			if !strings.HasPrefix(strings.TrimPrefix(name, "/"), "repo/.git/") {
				e.Errorf("not removed: %q", name)
			}
		}
		err = nil
	}
	if err != nil {
		e.Fatalf("Unmount: %v", err)
	}
	if _, err := os.Stat(filepath.Join(e.bucket, "repo/.git/refs/heads/feature")); err != nil {
		e.Errorf("the branch is not in the bucket: %v", err)
	}
}
