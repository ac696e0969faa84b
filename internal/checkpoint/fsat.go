package checkpoint

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"
)

// The tree belongs to the container, whose root can swap any folder for a symbolic
// link at any moment. So nothing in it is opened by a path that the kernel may
// follow out of it: openat2 holds every step below the root, on its file system,
// and off symbolic links.

const pathMax = 4000

// openBelow opens a path below the folder root. Paths longer than the kernel takes
// are walked in pieces.
func openBelow(root int, path string, flags int, mode uint32) (int, error) {
	if path == "" {
		path = "."
	}
	dir := root
	for len(path) > pathMax {
		i := strings.LastIndexByte(path[:pathMax], '/')
		if i <= 0 {
			return -1, unix.ENAMETOOLONG
		}
		next, err := open2(dir, path[:i], unix.O_PATH|unix.O_DIRECTORY, 0)
		if dir != root {
			unix.Close(dir)
		}
		if err != nil {
			return -1, err
		}
		dir, path = next, path[i+1:]
	}
	fd, err := open2(dir, path, flags, mode)
	if dir != root {
		unix.Close(dir)
	}
	return fd, err
}

func open2(dir int, path string, flags int, mode uint32) (int, error) {
	how := unix.OpenHow{
		Flags: uint64(flags) | unix.O_CLOEXEC | unix.O_NOFOLLOW, Mode: uint64(mode),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	if flags&unix.O_CREAT == 0 {
		how.Mode = 0 // else it is an error
	}
	for {
		fd, err := unix.Openat2(dir, path, &how)
		if err == unix.EINTR || err == unix.EAGAIN { // EAGAIN: something was renamed meanwhile
			continue
		}
		return fd, err
	}
}

// openRead opens for reading. O_NONBLOCK: a FIFO that took the file's place must
// not hold us.
func openRead(dir int, path string, flags int) (int, error) {
	flags |= unix.O_RDONLY | unix.O_NONBLOCK
	fd, err := openBelow(dir, path, flags|unix.O_NOATIME, 0)
	if err == unix.EPERM { // not ours
		fd, err = openBelow(dir, path, flags, 0)
	}
	return fd, err
}

// vanished says whether an error means that a name is not, or no more, what it was.
func vanished(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO)
}

// pread reads until b is full or the file ends.
func pread(fd int, b []byte, off int64) (int, error) {
	n := 0
	for n < len(b) {
		m, err := unix.Pread(fd, b[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, err
		}
		if m == 0 {
			return n, io.EOF
		}
		n += m
	}
	return n, nil
}

// readNames lists a folder; names are in no order.
func readNames(fd int, buf []byte) ([]string, error) {
	var names []string
	if _, err := unix.Seek(fd, 0, io.SeekStart); err != nil {
		return nil, err
	}
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

func readLink(dir int, name string) (string, error) {
	for size := 256; size <= maxPath; size *= 4 {
		b := make([]byte, size)
		n, err := unix.Readlinkat(dir, name, b)
		if err != nil {
			return "", err
		}
		if n < size {
			return string(b[:n]), nil
		}
	}
	return "", fmt.Errorf("symbolic link %q: %w", name, unix.ENAMETOOLONG)
}

// settle makes the next write through a memory mapping change the file's times: such
// a write does that only where a page was clean. Small files are rarely written like
// that, and SQLite's never; they are spared the wait for the disk.
func settle(fd int, st sig) error {
	if st.size <= smallFile {
		return nil
	}
	var begin [16]byte
	if n, err := pread(fd, begin[:], 0); err == nil && isSQLite(begin[:n]) {
		return nil
	}
	const writeAndWait = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	err := unix.SyncFileRange(fd, 0, 0, writeAndWait)
	if errors.Is(err, unix.ESPIPE) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return nil // not that kind of file system
	}
	return err
}
