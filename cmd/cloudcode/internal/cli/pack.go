package cli

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"syscall"
)

// packer writes a local file or folder as a tar archive.
type packer struct {
	tw      *tar.Writer
	skipped []string // sockets, devices and pipes

	links map[inode]string // files with several names, by the first one
}

type inode struct{ dev, ino uint64 }

// pack writes source to w, its names beginning with name. They belong to root,
// as everything in a session does.
func (p *packer) pack(ctx context.Context, w io.Writer, source, name string) error {
	p.tw, p.links = tar.NewWriter(w), map[inode]string{}
	err := filepath.WalkDir(source, func(file string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		rest, err := filepath.Rel(source, file)
		if err != nil {
			return err
		}
		return p.add(file, path.Join(name, filepath.ToSlash(rest)))
	})
	if err != nil {
		return err
	}
	return p.tw.Close()
}

func (p *packer) add(file, name string) error {
	info, err := os.Lstat(file)
	if err != nil {
		return err
	}
	link := ""
	switch info.Mode().Type() {
	case 0, fs.ModeDir:
	case fs.ModeSymlink:
		if link, err = os.Readlink(file); err != nil {
			return err
		}
	default:
		p.skipped = append(p.skipped, file)
		return nil
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	h.Name, h.Format = name, tar.FormatPAX
	h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
	h.AccessTime, h.ChangeTime = h.ModTime, h.ModTime
	if info.IsDir() {
		h.Name += "/"
		if name == "." {
			h.Name = "./"
		}
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode().IsRegular() && st.Nlink > 1 {
		key := inode{uint64(st.Dev), st.Ino} //nolint:unconvert // of other widths on other systems
		if first, seen := p.links[key]; seen {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			p.links[key] = name
		}
	}
	if h.Typeflag != tar.TypeReg {
		return p.tw.WriteHeader(h)
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.tw.WriteHeader(h); err != nil {
		return err
	}
	// The header has promised a size: what was added since is left out.
	n, err := io.Copy(p.tw, io.LimitReader(f, h.Size))
	if err == nil && n < h.Size {
		err = errors.New("it became shorter while it was read")
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	return nil
}
