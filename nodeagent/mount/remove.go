package mount

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/mountinfo"
)

// CheckBare returns ErrBusy if anything is mounted at path or below; path has no
// links in it.
func CheckBare(path string) error {
	all, err := mountinfo.All()
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.Point == path || strings.HasPrefix(m.Point, path+"/") {
			return fmt.Errorf("%w: %s is still mounted, so %s is not deleted", ErrBusy, m.Point, path)
		}
	}
	return nil
}

// RemoveAll is os.RemoveAll that never deletes what is mounted below path: that
// may be somebody's bucket. Returns ErrBusy then.
func RemoveAll(path string) error {
	// Links in what leads to path are the machine's own.
	real, err := filepath.EvalSymlinks(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	path = filepath.Join(real, filepath.Base(path))
	if err := CheckBare(path); err != nil {
		return err
	}
	parent, err := os.Open(real)
	if err != nil {
		return err
	}
	defer parent.Close()
	var st unix.Stat_t
	err = unix.Fstatat(int(parent.Fd()), filepath.Base(path), &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	return removeAt(int(parent.Fd()), filepath.Base(path), path, st.Dev)
}

// removeAt stays on one file system, whatever is mounted meanwhile.
func removeAt(parent int, name, path string, dev uint64) error {
	failed := func(err error) error { return &fs.PathError{Op: "remove", Path: path, Err: err} }
	err := unix.Unlinkat(parent, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOTEMPTY) {
		return failed(err)
	}
	fd, oerr := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(oerr, unix.ENOTDIR) {
		return failed(err)
	}
	if oerr != nil {
		return failed(oerr)
	}
	dir := os.NewFile(uintptr(fd), path)
	defer dir.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return failed(err)
	}
	if st.Dev != dev {
		return failed(fmt.Errorf("%w: something is mounted here", ErrBusy))
	}
	for {
		names, err := dir.Readdirnames(1024)
		for _, n := range names {
			if err := removeAt(fd, n, filepath.Join(path, n), dev); err != nil {
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
