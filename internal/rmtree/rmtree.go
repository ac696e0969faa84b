// Package rmtree deletes trees that somebody else made: of any depth with few open
// files, through no symbolic link, and never what is mounted in them.
package rmtree

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrMounted: something is mounted in the tree. It is left alone.
var ErrMounted = errors.New("something is mounted here")

// levels is how many folders are open at a time, one in another. What is deeper is
// moved up first.
const levels = 64

// Remove deletes path and all below. What does not exist is no error. Links in what
// leads to path are followed.
func Remove(path string) error {
	parent, err := os.Open(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	r := remover{top: -1}
	return r.remove(int(parent.Fd()), filepath.Base(path), path, 0)
}

type remover struct {
	top   int // the folder that is deleted
	moved int
}

func (r *remover) remove(parent int, name, path string, depth int) error {
	failed := func(err error) error { return &fs.PathError{Op: "remove", Path: path, Err: err} }
	err := unix.Unlinkat(parent, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOTEMPTY) {
		return failed(err)
	}
	fd, oerr := open(parent, name)
	if errors.Is(oerr, unix.EXDEV) {
		return failed(ErrMounted)
	}
	if errors.Is(oerr, unix.ENOTDIR) {
		return failed(err)
	}
	if oerr != nil {
		return failed(oerr)
	}
	dir := os.NewFile(uintptr(fd), path)
	defer dir.Close()
	if depth == 0 {
		r.top = fd
	}
	if depth >= levels && r.up(parent, name) {
		return nil
	}
	for {
		names, err := dir.Readdirnames(1024)
		for _, n := range names {
			if err := r.remove(fd, n, filepath.Join(path, n), depth+1); err != nil {
				return err
			}
		}
		if len(names) == 0 {
			if err != nil && !errors.Is(err, io.EOF) {
				return failed(err)
			}
			break
		}
		if _, err := dir.Seek(0, 0); err != nil { // what was read is gone
			return failed(err)
		}
	}
	if err := unix.Unlinkat(parent, name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return failed(err)
	}
	return nil
}

// open enters no mount, not even one of the same file system.
func open(parent int, name string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS,
	}
	for {
		fd, err := unix.Openat2(parent, name, &how)
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return fd, err
		}
	}
}

// up moves a folder to the top, where its turn comes again. Where that cannot be, on
// a full disk for instance, it is entered where it is.
func (r *remover) up(parent int, name string) bool {
	if unix.Unlinkat(parent, name, unix.AT_REMOVEDIR) == nil { // it was empty
		return true
	}
	const tries = 100 // the names may be the tree's own
	for range tries {
		r.moved++
		err := unix.Renameat2(parent, name, r.top, fmt.Sprintf(".removing-%d", r.moved), unix.RENAME_NOREPLACE)
		if !errors.Is(err, unix.EEXIST) {
			return err == nil
		}
	}
	return false
}
