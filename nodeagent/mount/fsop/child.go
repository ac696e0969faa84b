package fsop

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

func childMain() int {
	var req request
	if err := json.NewDecoder(os.Stdin).Decode(&req); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	var resp response
	var err error
	switch req.Op {
	case "stat":
		err = stat(req.Path)
	case "fsync":
		err = fsync(req.Path)
	case "setxattr":
		err = setxattr(req.Path, req.Attr, req.Names)
	case "list":
		resp.Names, err = list(req.Path)
	case "tree":
		err = req.Tree.attach()
	default:
		err = fmt.Errorf("unknown operation %q", req.Op)
	}
	if err != nil {
		resp.Error = err.Error()
		if errors.As(err, &resp.Errno) {
			// The errno's own words are added again on the other side.
			resp.Error = trimErrno(resp.Error, resp.Errno)
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(resp); err != nil {
		return 2
	}
	return 0
}

func trimErrno(s string, errno syscall.Errno) string {
	tail := errno.Error()
	if len(s) >= len(tail) && s[len(s)-len(tail):] == tail {
		s = s[:len(s)-len(tail)]
	}
	for len(s) > 0 && (s[len(s)-1] == ' ' || s[len(s)-1] == ':') {
		s = s[:len(s)-1]
	}
	return s
}

func stat(path string) error {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_FORCE_SYNC|unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		return err
	}
	var fs unix.Statfs_t
	return unix.Statfs(path, &fs)
}

func fsync(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fsync(fd)
}

func list(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(16)
	if len(names) > 0 {
		return names, nil
	}
	if err != nil && err.Error() == "EOF" {
		err = nil
	}
	return nil, err
}

func setxattr(path, attr string, names []string) error {
	// A private copy of the mount: it may be written to although the mount is
	// read-only, and it ends with this process.
	root, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	if err := unix.MountSetattr(root, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return err
	}
	for _, name := range names {
		fd, err := unix.Openat2(root, name, &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue
		}
		if err != nil {
			return err
		}
		err = unix.Fsetxattr(fd, attr, nil, 0)
		_ = unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return nil
}
