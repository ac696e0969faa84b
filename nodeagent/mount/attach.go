package mount

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/fsop"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/mountinfo"
)

// Bind is a mount on top of an attached one.
type Bind struct {
	Source string // an absolute folder; "" hides Target behind an empty, read-only one
	Target string // relative to the root of what is attached; made if missing
}

// Attach shows the mount at source at target too. See AttachTree.
func Attach(ctx context.Context, source, target string) error {
	return AttachTree(ctx, source, target, nil)
}

// AttachTree shows the mount at source, with over on top, at the folder target, and
// in every container whose bind of that very folder (rbind, rslave) is older: the
// kernel mounts it on the root of their bind. For that, target must lie on a shared
// mount. It replaces what is attached there, dead or alive, in one step, and leaves
// it alone if it is the same already.
//
// A container may own what is at these paths: none is followed through a symlink.
func AttachTree(ctx context.Context, source, target string, over []Bind) error {
	if !filepath.IsAbs(source) || !filepath.IsAbs(target) {
		return fmt.Errorf("%w: attaching %q to %q", ErrInvalid, source, target)
	}
	same, err := attached(source, target, over)
	if err != nil || same {
		return err
	}
	o := make([]fsop.Over, len(over))
	for i, b := range over {
		o[i] = fsop.Over(b)
	}
	if err := fsop.AttachTree(ctx, source, target, o); err != nil {
		return fmt.Errorf("attaching %s to %s: %w", source, target, err)
	}
	return nil
}

// Detach undoes AttachTree, with all on top, in use or not. What is not attached is
// no error.
func Detach(target string) error { return fsop.Detach(target) }

// attached says whether target already shows the mount at source, with over on top.
func attached(source, target string, over []Bind) (bool, error) {
	all, err := mountinfo.All()
	if err != nil {
		return false, err
	}
	var src *mountinfo.Mount
	at := map[string][]mountinfo.Mount{}
	for _, m := range all {
		if m.Point == source {
			src = &m
		}
		at[m.Point] = append(at[m.Point], m)
	}
	top := at[target]
	if src == nil || len(top) != 1 || top[0].Dev != src.Dev || top[0].Root != src.Root {
		return false, nil
	}
	for _, b := range over {
		if len(at[filepath.Join(target, b.Target)]) != 1 {
			return false, nil
		}
	}
	return true, nil
}
