package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// archiveChunk is how much of an archive is sent at a time.
const archiveChunk = 256 << 10

// readArchive opens an archive of a session's files. It returns when the first
// bytes are there, so that errors come before a file is made. The reader is to
// be closed; about is how many bytes will come, 0 if that is not known.
func (c *client) readArchive(ctx context.Context, req *cloudcodev1.ReadArchiveRequest) (r io.ReadCloser, about int64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.sessions.ReadArchive(ctx, req)
	if err != nil {
		cancel()
		return nil, 0, err
	}
	a := &archiveReader{stream: stream, cancel: cancel}
	for len(a.rest) == 0 {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			a.err = err
			break
		}
		if err != nil {
			cancel()
			return nil, 0, err
		}
		about = max(about, resp.GetEstimatedBytes())
		a.rest = resp.GetData()
	}
	return a, about, nil
}

type archiveReader struct {
	stream interface {
		Recv() (*cloudcodev1.ReadArchiveResponse, error)
	}
	cancel context.CancelFunc
	rest   []byte
	err    error
}

func (a *archiveReader) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.err != nil {
			return 0, a.err
		}
		var resp *cloudcodev1.ReadArchiveResponse
		if resp, a.err = a.stream.Recv(); a.err == nil {
			a.rest = resp.GetData()
		}
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

func (a *archiveReader) Close() error {
	a.cancel()
	return nil
}

// writeArchive unpacks what src holds into a session's folder. If src fails, the
// call is broken off, so that the server does not take what came for all.
func (c *client) writeArchive(ctx context.Context, name, path string, src io.Reader) (*cloudcodev1.WriteArchiveResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.sessions.WriteArchive(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&cloudcodev1.WriteArchiveRequest{Name: name, Path: path})
	src = unbroken{src}
	buf := make([]byte, archiveChunk)
	for err == nil {
		var n int
		var rerr error
		// Full chunks: a tar writer gives 512 bytes at a time.
		if n, rerr = io.ReadFull(src, buf); n > 0 {
			err = stream.Send(&cloudcodev1.WriteArchiveRequest{Data: buf[:n]})
		}
		if errors.Is(rerr, io.EOF) || errors.Is(rerr, io.ErrUnexpectedEOF) {
			break
		}
		if rerr != nil && err == nil {
			return nil, rerr
		}
	}
	if err != nil && !errors.Is(err, io.EOF) { // EOF: the server has said why
		return nil, err
	}
	return stream.CloseAndRecv()
}

// unbroken says that its reader ended too early in a way that io.ReadFull does
// not take for an end like any other.
type unbroken struct{ io.Reader }

func (u unbroken) Read(p []byte) (int, error) {
	n, err := u.Reader.Read(p)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = errors.New("the archive breaks off: it is not complete")
	}
	return n, err
}

// saveFile writes a file through save, and leaves nothing half written behind: a
// file appears when it is complete. What is no regular file (a pipe, a device) is
// written as it is.
func saveFile(path string, save func(io.Writer) error) error {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		if info.IsDir() {
			return usagef("%s is a folder; name a file", path)
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(save(f), f.Close())
	}
	// Private like what it holds: chats and keys of programs.
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".part-*")
	if err != nil {
		return usagef("%w", err)
	}
	err = save(f)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// transfer copies with progress. On a terminal that is a bar; elsewhere nothing.
func transfer(cmd *cobra.Command, r io.Reader, text string, about int64) (io.Reader, func()) {
	w := cmd.ErrOrStderr()
	if screenOf(w) == nil {
		return r, func() {}
	}
	view := newTransferView(w)
	return view.reader(r, text, about), view.clear
}
