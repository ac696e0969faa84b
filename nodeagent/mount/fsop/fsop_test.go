package fsop

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestOperations(t *testing.T) {
	dir := t.TempDir()
	ctx := t.Context()
	if err := Stat(ctx, dir); err != nil {
		t.Error(err)
	}
	if err := Fsync(ctx, dir); err != nil {
		t.Error(err)
	}
	if names, err := List(ctx, dir); err != nil || len(names) != 0 {
		t.Errorf("List: %q, %v", names, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if names, err := List(ctx, dir); err != nil || !slices.Equal(names, []string{"f"}) {
		t.Errorf("List: %q, %v", names, err)
	}
	missing := filepath.Join(dir, "missing")
	for _, err := range []error{Stat(ctx, missing), Fsync(ctx, missing), AttachTree(ctx, missing, dir, nil)} {
		if !errors.Is(err, syscall.ENOENT) {
			t.Errorf("of what is missing: %v", err)
		}
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := Stat(ended, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}

// deadlocked mounts a file system that reads requests and does not answer them,
// until release.
func deadlocked(t *testing.T) (point string, read <-chan struct{}, release func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("mounting needs root")
		}
		t.Skip("mounting needs root")
	}
	point = t.TempDir()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("test", point, "fuse.test", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		t.Fatal(err)
	}
	dev := os.NewFile(uintptr(fd), "/dev/fuse")
	got := make(chan struct{}, 16)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<17)
		for {
			n, err := dev.Read(buf)
			if err != nil || n < 40 {
				return
			}
			const opInit = 26
			if binary.LittleEndian.Uint32(buf[4:]) != opInit {
				got <- struct{}{}
				continue
			}
			out := make([]byte, 16+64)
			binary.LittleEndian.PutUint32(out, uint32(len(out)))
			copy(out[8:16], buf[8:16])                       // which request
			binary.LittleEndian.PutUint32(out[16:], 7)       // version …
			binary.LittleEndian.PutUint32(out[20:], 31)      // … 7.31
			binary.LittleEndian.PutUint32(out[16+20:], 4096) // max_write
			if _, err := dev.Write(out); err != nil {
				return
			}
		}
	}()
	var released bool
	release = func() {
		if released {
			return
		}
		released = true
		_ = dev.Close() // as when a mounter is killed
		<-done
		if err := Detach(point); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(release)
	return point, got, release
}

// The worst of all: not even SIGKILL ends who waits for such a file system.
func TestStuck(t *testing.T) {
	point, read, release := deadlocked(t)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	begun := time.Now()
	err := Stat(ctx, point)
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("Stat took %v", took)
	}
	<-read
	var stuck *StuckError
	if !errors.As(err, &stuck) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	select {
	case <-stuck.Done:
		t.Error("the child has ended")
	default:
	}
	release()
	select {
	case <-stuck.Done:
	case <-time.After(10 * time.Second):
		t.Error("the child outlives its mounter")
	}
}
