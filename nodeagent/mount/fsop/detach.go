package fsop

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/mountinfo"
)

// Detach removes all that is mounted at exactly this path, with what is on top of
// it, in use or not, here and wherever it has propagated to. It asks no file system
// for anything and so needs no child.
func Detach(path string) error {
	for range 64 {
		at, err := mountinfo.At(path)
		if err != nil || len(at) == 0 {
			return err
		}
		err = unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: gone meanwhile
			return fmt.Errorf("detaching %s: %w", path, err)
		}
	}
	return fmt.Errorf("detaching %s: mounts keep appearing there", path)
}
