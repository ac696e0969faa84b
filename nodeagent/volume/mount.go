package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/cleanenv"
)

const (
	// toolTimeout bounds mkfs, fsck and resize.
	toolTimeout = 2 * time.Minute
	// detachTimeout is how long a loop device may take to go after its unmount:
	// a container's last mounts are torn down in the background.
	detachTimeout = 10 * time.Second
)

// prepare makes Dir a mount of its own, nosuid and nodev, that shares what is
// mounted below it with the containers. After a reboot it does so again.
func (m *Manager) prepare() error {
	if !filepath.IsAbs(m.Dir) {
		return fmt.Errorf("volume folder %q is not an absolute path", m.Dir)
	}
	if err := os.MkdirAll(m.Dir, 0o700); err != nil {
		return err
	}
	dir, err := filepath.EvalSymlinks(m.Dir)
	if err != nil {
		return err
	}
	m.Dir = dir
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	source, err := mountedAt(dir)
	if err != nil {
		return err
	}
	if source == "" {
		if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("binding %s on itself: %w", dir, err)
		}
	}
	// Also when it was mounted: a daemon may have died between these.
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("mounting %s nosuid,nodev: %w", dir, err)
	}
	if err := unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("sharing mounts below %s: %w", dir, err)
	}
	return nil
}

// mountedAt returns what is mounted at exactly this path, "" for nothing.
func mountedAt(path string) (source string, err error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	want := mountinfoEscape(path)
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 5 || f[4] != want {
			continue
		}
		for i, v := range f {
			if v == "-" && i+2 < len(f) {
				source = f[i+2] // the last one is on top
			}
		}
	}
	return source, nil
}

var mountinfoEscape = strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`).Replace

// makeDisk makes a sparse file system. Without a journal it costs 40 ms and no
// space; mountDisk checks it when a crash left it unclean.
func makeDisk(ctx context.Context, path string, size int64) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := truncate(tmp, size); err != nil {
		return err
	}
	// One inode for 8 KiB: workspaces are full of small files. One percent is for
	// the machine's root only, who the container's root is not: without it a
	// session that has filled its disk could not be started again.
	if err := tool(ctx, 0, "mkfs.ext4", "-q", "-F", "-m", "1", "-i", "8192", "-O", "^has_journal",
		"-E", "lazy_itable_init=1,nodiscard", tmp); err != nil {
		_ = os.Remove(tmp)
		return err
	}
	return os.Rename(tmp, path)
}

func truncate(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(size)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if errors.Is(err, unix.EFBIG) {
		return fmt.Errorf("%w: a disk of %d bytes is larger than this machine's file system allows", ErrInvalid, size)
	}
	return err
}

func mountDisk(ctx context.Context, disk, at string) error {
	source, err := mountedAt(at)
	if err != nil || source != "" {
		return err
	}
	// A container may still have it although nobody mounts it here. A second
	// loop device on the same file would destroy it.
	source, err = deviceOf(disk)
	if err != nil {
		return err
	}
	if source == "" {
		// 1: errors were corrected.
		if err := tool(ctx, 1, "e2fsck", "-p", disk); err != nil {
			return fmt.Errorf("%s is damaged; `e2fsck -f %[1]s` may repair it: %w", disk, err)
		}
		dev, err := attach(disk)
		if err != nil {
			return err
		}
		defer dev.Close() // with autoclear, the mount is what keeps the device
		source = dev.Name()
	}
	err = unix.Mount(source, at, "ext4", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, "")
	if err != nil {
		return fmt.Errorf("mounting %s: %w", disk, err)
	}
	return nil
}

// deviceOf returns the loop device that holds disk, "" for none.
func deviceOf(disk string) (string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return "", err
	}
	for _, f := range files {
		// Those of other programs may go away meanwhile.
		if data, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(data)) == disk {
			return filepath.Join("/dev", filepath.Base(filepath.Dir(filepath.Dir(f)))), nil
		}
	}
	return "", nil
}

// attach returns a loop device that goes away with its last user.
func attach(disk string) (*os.File, error) {
	back, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("this machine has no loop devices (`modprobe loop`): %w", err)
	}
	defer ctl.Close()
	for range 32 { // another process may take the free one first
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("finding a free loop device: %w", err)
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		cfg := unix.LoopConfig{Fd: uint32(back.Fd())}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		copy(cfg.Info.File_name[:], disk)
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if err == nil {
			return dev, nil
		}
		_ = dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("setting up a loop device: %w", err)
		}
	}
	return nil, errors.New("no loop device stays free long enough")
}

// growDisk makes a mounted file system larger: in place, or where the kernel
// does not allow that (it wants CAP_SYS_RESOURCE) unmounted for a moment, which
// works only while no container has it.
func growDisk(ctx context.Context, disk, at string, size int64) error {
	source, err := mountedAt(at)
	if err != nil {
		return err
	}
	if fi, err := os.Stat(disk); err != nil {
		return err
	} else if fi.Size() < size { // else an earlier try came this far
		if err := truncate(disk, size); err != nil {
			return err
		}
	}
	online := resizeOnline(ctx, source)
	if online == nil {
		return nil
	}
	offline := func() error {
		if err := unmountDisk(ctx, disk, at); err != nil {
			return err
		}
		if err := tool(ctx, 1, "e2fsck", "-f", "-p", disk); err != nil {
			return err
		}
		return tool(ctx, 0, "resize2fs", disk)
	}()
	if err := mountDisk(ctx, disk, at); err != nil {
		return err
	}
	if offline != nil {
		return fmt.Errorf("growing the disk while it is in use: %w; stop the session first (%w)", online, offline)
	}
	return nil
}

func resizeOnline(ctx context.Context, device string) error {
	dev, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("growing %s: %w", device, err)
	}
	return tool(ctx, 0, "resize2fs", device)
}

func unmountDisk(ctx context.Context, disk, at string) error {
	source, err := mountedAt(at)
	if err != nil || source == "" {
		return err
	}
	if err := unmountPoint(at); err != nil {
		return err
	}
	return waitDetached(ctx, source, disk)
}

// unmountPoint is idempotent.
func unmountPoint(at string) error {
	for {
		source, err := mountedAt(at)
		if err != nil || source == "" {
			return err
		}
		if err := unix.Unmount(at, unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmounting %s: %w", at, err)
		}
	}
}

// waitDetached returns when the loop device has let go of the disk: before, its
// data may not be written, and the space of a deleted file is not free.
func waitDetached(ctx context.Context, device, disk string) error {
	ctx, cancel := context.WithTimeout(ctx, detachTimeout)
	defer cancel()
	backing := filepath.Join("/sys/block", filepath.Base(device), "loop", "backing_file")
	for {
		data, err := os.ReadFile(backing)
		if err != nil || strings.TrimSuffix(strings.TrimSpace(string(data)), " (deleted)") != disk {
			return nil
		}
		t := time.NewTimer(5 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%s is still in use: a container of the session has not ended", device)
		}
	}
}

// tool runs a program of e2fsprogs; exit codes up to okCode are success.
func tool(ctx context.Context, okCode int, name string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, toolTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(cleanenv.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin", "LC_ALL=C")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil || errors.As(err, &exit) && exit.ExitCode() >= 0 && exit.ExitCode() <= okCode:
		return nil
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("the program %s is missing (Debian package e2fsprogs): %w", name, err)
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", name, ctx.Err())
	}
	return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(out.String()))
}
