package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The session's processes swap a folder for a FIFO again and again while it is
// read: nobody waits for the FIFO's other end.
func TestFIFOInAFoldersPlace(t *testing.T) {
	tree, dir := newTree(t)
	p := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.Mkdir(p("x"), 0o755))
	must(t, os.WriteFile(p("x/file"), nil, 0o644))
	must(t, unix.Mkfifo(p("y"), 0o600))
	for i := range 50 { // so that some time passes between the listing and its end
		must(t, os.Mkdir(p(fmt.Sprintf("d%02d", i)), 0o755))
	}
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, p("x"), unix.AT_FDCWD, p("y"), unix.RENAME_EXCHANGE)
			}
		}
	})
	defer swapper.Wait()
	defer close(stop)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			if err := tree.Write(ctx, ".", io.Discard); err != nil && ctx.Err() == nil {
				done <- err
				return
			}
			_, _, err := tree.Extract(ctx, "x", strings.NewReader(""))
			if err != nil && !errors.Is(err, ErrInvalid) && ctx.Err() == nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	select {
	case err := <-done:
		must(t, err)
	case <-time.After(20 * time.Second):
		t.Fatal("it waits for a FIFO")
	}
}

// A link in a folder's place leads nowhere, not even within the tree.
func TestFolderThatBecameALink(t *testing.T) {
	tree, dir := newTree(t)
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
	fi, err := tree.Root.Lstat("a")
	must(t, err)
	here, names, err := open(tree.Root, "a", fi)
	if err != nil || here == nil || len(names) != 1 {
		t.Fatalf("%v, %q, %v", here, names, err)
	}
	must(t, here.Close())
	must(t, os.Rename(filepath.Join(dir, "a"), filepath.Join(dir, "z")))
	must(t, os.Symlink(".", filepath.Join(dir, "a")))
	if here, names, err := open(tree.Root, "a", fi); here != nil || err != nil {
		t.Errorf("%v, %q, %v", here, names, err)
	}
}

// What is too deep to be used is left out, and costs no more than its depth.
func TestDeepFolders(t *testing.T) {
	tree, dir := newTree(t)
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	must(t, err)
	for range 6000 {
		must(t, unix.Mkdirat(fd, "d", 0o755))
		next, err := unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_RDONLY, 0)
		must(t, err)
		must(t, unix.Close(fd))
		fd = next
	}
	must(t, unix.Close(fd))
	must(t, os.WriteFile(filepath.Join(dir, "other"), []byte("x"), 0o644))
	t.Cleanup(func() { // RemoveAll of the test's folder would take paths
		_ = os.RemoveAll(filepath.Join(dir, "d"))
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	start := time.Now()
	var buf bytes.Buffer
	must(t, tree.Write(ctx, ".", &buf))
	t.Logf("6000 levels: %v", time.Since(start))
	longest, files := 0, 0
	for r := tar.NewReader(&buf); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		longest = max(longest, len(strings.TrimSuffix(h.Name, "/")))
		if h.Typeflag == tar.TypeReg {
			files++
		}
	}
	if longest != maxPath-1 || files != 1 { // "d/d/…/d" has odd lengths only
		t.Errorf("the longest path has %d bytes, %d files", longest, files)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := tree.Write(ended, ".", io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("without time: %v", err)
	}
}
