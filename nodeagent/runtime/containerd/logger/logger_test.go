package logger

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func lines(t *testing.T, dir string, opts ReadOptions) []string {
	t.Helper()
	var out []string
	for l, err := range Read(t.Context(), dir, opts) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, l.Text)
	}
	return out
}

func TestRun(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "by", "run")
	stdout, outW := io.Pipe()
	stderr, errW := io.Pipe()
	ready := make(chan struct{})
	var wg sync.WaitGroup
	var err error
	wg.Go(func() {
		err = run(t.Context(), dir, stdout, stderr, func() error { close(ready); return nil })
	})
	<-ready
	long := strings.Repeat("x", maxLine+10)
	fmt.Fprintf(outW, "first\n\n%s\nno newline at the end", long)
	fmt.Fprintln(errW, "problem")
	_, _ = outW.Close(), errW.Close()
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for l, err := range Read(t.Context(), dir, ReadOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		if l.Stream == "stdout" {
			got = append(got, fmt.Sprint(len(l.Text), l.Partial))
		} else if l.Text != "problem" || time.Since(l.Time) > time.Minute {
			t.Errorf("stderr: %+v", l)
		}
	}
	want := []string{"5 false", "0 false", fmt.Sprint(maxLine, " true"), "10 false", "21 false"}
	if strings.Join(got, ",") != strings.Join(want, ",") {
		t.Errorf("stdout lines %v, want %v", got, want)
	}
}

// The shim's SIGTERM must not lose what is still in the pipes, nor may a child
// that keeps them open hold the logger for ever.
func TestRunDrains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		stdout, outW := io.Pipe()
		stderr, _ := io.Pipe()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- run(ctx, dir, stdout, stderr, func() error { return nil }) }()
		cancel()
		fmt.Fprintln(outW, "last words")
		start := time.Now()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != drainBudget {
			t.Errorf("ended after %s, want %s", took, drainBudget)
		}
		if got := lines(t, dir, ReadOptions{}); len(got) != 1 || got[0] != "last words" {
			t.Errorf("log %q", got)
		}
	})
}

func TestRotation(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(dir, 1000, MaxFiles)
	for i := range 200 {
		w.write("stdout", fmt.Appendf(nil, "line %d", i), true)
	}
	w.close()
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != MaxFiles {
		t.Fatalf("files %v %v", files, err)
	}
	for _, f := range files {
		if fi, err := f.Info(); err != nil || fi.Size() > 1000 || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f.Name(), fi, err)
		}
	}
	got := lines(t, dir, ReadOptions{})
	if len(got) < 30 || got[len(got)-1] != "line 199" {
		t.Fatalf("%d lines, the last is %q", len(got), got[len(got)-1])
	}
	for i, l := range got {
		if want := fmt.Sprintf("line %d", 200-len(got)+i); l != want {
			t.Fatalf("line %q, want %q", l, want)
		}
	}
	// The tail may begin in an older file.
	for _, n := range []int{1, 5, 30, len(got)} {
		if tail := lines(t, dir, ReadOptions{TailLines: n}); len(tail) != n || tail[n-1] != "line 199" {
			t.Errorf("the last %d: %d lines", n, len(tail))
		}
	}
	if tail := lines(t, dir, ReadOptions{TailLines: 10_000}); len(tail) != len(got) {
		t.Errorf("more than there are: %d lines, want %d", len(tail), len(got))
	}
	if tail := lines(t, dir, ReadOptions{TailLines: -1}); len(tail) != 0 {
		t.Errorf("none wanted: %q", tail)
	}
}

func TestSince(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(dir, 1000, 2)
	w.write("stdout", []byte("old"), true)
	now := time.Now()
	w.write("stdout", []byte("new"), true)
	w.close()
	if got := lines(t, dir, ReadOptions{Since: now}); len(got) != 1 || got[0] != "new" {
		t.Errorf("since: %q", got)
	}
	if got := lines(t, filepath.Join(dir, "nothing"), ReadOptions{}); got != nil {
		t.Errorf("no folder: %q", got)
	}
}

// Follow must lose nothing and repeat nothing over rotations.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const n = 400
	next := make(chan struct{}) // the writer stays within what rotation keeps
	var wg sync.WaitGroup
	wg.Go(func() {
		w := newWriter(dir, 1000, MaxFiles)
		defer w.close()
		for i := range n {
			w.write("stdout", fmt.Appendf(nil, "line %d", i), true)
			if i%20 == 19 {
				select {
				case <-next:
				case <-ctx.Done():
					return
				}
			}
		}
	})
	i := 0
	for l, err := range Read(ctx, dir, ReadOptions{Follow: true}) {
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("line %d", i); l.Text != want {
			t.Fatalf("%q, want %q", l.Text, want)
		}
		if i++; i%20 == 0 {
			next <- struct{}{}
		}
		if i == n {
			break
		}
	}
	wg.Wait()
	if i != n {
		t.Errorf("%d lines of %d", i, n)
	}
}

func TestFollowEndsWithContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		for l, err := range Read(ctx, t.TempDir(), ReadOptions{Follow: true}) {
			t.Errorf("%+v %v", l, err)
		}
		if ctx.Err() == nil {
			t.Error("ended before its context")
		}
	})
}

// TestFullDisk fills a real file system: lines are lost and counted, and the
// writer neither blocks nor leaves half a line.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("mounting needs root")
		}
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	fill := filepath.Join(dir, "fill")
	if err := os.WriteFile(fill, make([]byte, 40<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWriter(dir, MaxFileBytes, MaxFiles)
	text := []byte(strings.Repeat("x", 1000))
	for range 50 {
		w.write("stdout", text, true)
		w.retryAt = time.Time{} // do not wait for the real second
	}
	if w.dropped == 0 {
		t.Fatal("nothing was lost on a full disk")
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	w.write("stdout", []byte("works again"), true)
	w.close()
	got := lines(t, dir, ReadOptions{})
	if len(got) < 3 || got[len(got)-1] != "works again" || !strings.Contains(got[len(got)-2], "lines lost") {
		t.Errorf("%d lines, the last %q", len(got), got[max(0, len(got)-2):])
	}
	for _, l := range got[:len(got)-2] {
		if l != string(text) {
			t.Errorf("a broken line of %d bytes", len(l))
		}
	}
}

func TestParse(t *testing.T) {
	for _, bad := range []string{"", "x", "2026-11-23T20:35:51Z", "2026-11-23T20:35:51Z stdout", "no stdout F x"} {
		if l, ok := parse([]byte(bad)); ok {
			t.Errorf("%q parsed as %+v", bad, l)
		}
	}
}

func TestUnwritable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stdout, w := io.Pipe()
	stderr, w2 := io.Pipe()
	_ = w2.Close()
	done := make(chan error, 1)
	go func() {
		done <- run(t.Context(), filepath.Join(file, "below"), stdout, stderr, func() error { return nil })
	}()
	for range 1000 { // the container must not block
		fmt.Fprintln(w, "lost")
	}
	_ = w.Close()
	if err := <-done; err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}
