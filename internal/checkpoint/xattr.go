package checkpoint

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	xattrCaps    = "security.capability"
	xattrAccess  = "system.posix_acl_access"
	xattrDefault = "system.posix_acl_default"

	// idRange is how many ids a container has.
	idRange = 65536
	nobody  = 65534
)

// ids translates between ids of the host and those inside the container.
type ids struct{ base uint32 }

func (m ids) inside(id uint32) (uint32, bool) {
	if m.base == 0 {
		return id, true
	}
	if id < m.base || id-m.base >= idRange {
		return nobody, false
	}
	return id - m.base, true
}

func (m ids) outside(id uint32) uint32 {
	if m.base != 0 && id >= idRange {
		id = nobody
	}
	return m.base + id
}

// savedXattr: attributes of other names are the machine's (labels, integrity, overlays).
// A checkpoint that has them was made by no writer, and must not set them here.
func savedXattr(name string) bool {
	return strings.HasPrefix(name, "user.") || name == xattrCaps || name == xattrAccess || name == xattrDefault
}

// readXattrs gives the attributes that are saved, with ids as inside the container.
func readXattrs(fd int, m ids) ([]xattr, error) {
	n, err := unix.Flistxattr(fd, nil)
	if n == 0 || errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	buf := make([]byte, n+256)
	n, err = unix.Flistxattr(fd, buf)
	if err != nil {
		return nil, err
	}
	var all []xattr
	total := 0
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if !savedXattr(name) {
			continue
		}
		value := make([]byte, maxXattr)
		n, err := unix.Fgetxattr(fd, name, value)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if total += len(name) + n; total > maxXattrs {
			break
		}
		all = append(all, xattr{name, string(shift(name, value[:n], func(id uint32) uint32 { id, _ = m.inside(id); return id }, m.base, false))})
	}
	slices.SortFunc(all, func(a, b xattr) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

func writeXattr(fd int, x xattr, m ids) error {
	return unix.Fsetxattr(fd, x.name, shift(x.name, []byte(x.value), m.outside, m.base, true), 0)
}

// shift translates the ids in an attribute's value.
//
// Capabilities are saved as they look to the container's root: in the form without
// a root id if they are its own. On the host they have one, except where ids are
// not translated.
func shift(name string, v []byte, id func(uint32) uint32, base uint32, out bool) []byte {
	const revision2, revision3, mask, size2, size3 = 0x02000000, 0x03000000, 0xff000000, 20, 24
	le := binary.LittleEndian
	switch name {
	case xattrCaps:
		if len(v) < 4 || base == 0 {
			return v
		}
		switch head := le.Uint32(v); {
		case head&mask == revision3 && len(v) == size3:
			v = slices.Clone(v)
			root := id(le.Uint32(v[size2:]))
			if !out && root == 0 {
				le.PutUint32(v, head&^mask|revision2)
				return v[:size2]
			}
			le.PutUint32(v[size2:], root)
		case head&mask == revision2 && len(v) == size2 && out:
			v = le.AppendUint32(slices.Clone(v), base)
			le.PutUint32(v, head&^mask|revision3)
		}
	case xattrAccess, xattrDefault:
		const aclUser, aclGroup = 0x02, 0x08
		v = slices.Clone(v)
		for i := 4; i+8 <= len(v); i += 8 {
			if tag := le.Uint16(v[i:]); tag == aclUser || tag == aclGroup {
				le.PutUint32(v[i+4:], id(le.Uint32(v[i+4:])))
			}
		}
	}
	return v
}
