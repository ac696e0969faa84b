package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/cloudcode-dev/cloudcode/internal/rmtree"
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
	err = rmtree.Remove(path)
	if errors.Is(err, rmtree.ErrMounted) {
		err = fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return err
}
