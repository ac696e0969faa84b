package cli

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func newSessionExportCmd() *cobra.Command {
	var at, file string
	cmd := &cobra.Command{
		Use:   "export ID",
		Short: "Write all that a session has into a tar archive",
		Long: `Write a session's files and chats, all of /root/s3 but the bucket and caches, as a tar
archive: as they are now, or as a checkpoint has them. A session that is on no node
is read from its newest checkpoint.

A file appears when it is complete, and only you can read it: chats and settings are
in it. "cloudcode session import" takes it in.`,
		Example: `  cloudcode session export main -f main.tar
  cloudcode session export main --at 20261124t2149 | zstd > main.tar.zst`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			name, err := sessionName(a[0])
			if err != nil {
				return err
			}
			if file == "-" && screenOf(cmd.OutOrStdout()) != nil {
				return usagef("an archive is not for terminals; redirect the output, or name a file with -f")
			}
			return withClient(cmd, func(c *client) error {
				r, about, err := c.readArchive(cmd.Context(), &cloudcodev1.ReadArchiveRequest{Name: name, Checkpoint: at})
				if err != nil {
					return err
				}
				defer r.Close()
				shown, clear := transfer(cmd, r, "exporting "+idOf(name), about)
				defer clear()
				var bytes int64
				save := func(w io.Writer) (err error) {
					bytes, err = io.Copy(w, shown)
					return err
				}
				if file == "-" {
					return save(cmd.OutOrStdout())
				}
				err = saveFile(file, save)
				clear()
				if err != nil {
					return err
				}
				switch out := cmd.OutOrStdout(); outputOf(cmd) {
				case formatJSON:
					return printValueJSON(out, map[string]any{"session": name, "file": file, "bytes": bytes})
				case formatName:
					_, err = fmt.Fprintln(out, file)
				default:
					_, err = fmt.Fprintf(out, "session %s exported to %s, %s\n", idOf(name), plain(file), formatBytes(bytes))
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&at, "at", "", "export this `CHECKPOINT` (default: as the session is now)")
	f.StringVarP(&file, "file", "f", "-", "write to `FILE`; - is stdout")
	SetEnvName(f, "at", "")
	SetEnvName(f, "file", "")
	_ = cmd.RegisterFlagCompletionFunc("at", completeCheckpoints)
	_ = cmd.MarkFlagFilename("file", "tar")
	return cmd
}

func newSessionImportCmd() *cobra.Command {
	var file string
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "import ID",
		Short: "Unpack a tar archive of a session into a session",
		Long: `Unpack an archive that "cloudcode session export" has made (gzip is fine, too) into
/root/s3 of a session. Files of the same name are replaced, others stay.

A session that does not exist is created first, with the server's defaults; to have
it with other limits or storage, create it yourself before. One that starts is
waited for; one that is suspended has to be resumed.`,
		Example: `  cloudcode session import copy -f main.tar
  zstd -dc main.tar.zst | cloudcode session import copy`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			name, err := sessionName(a[0])
			if err != nil {
				return err
			}
			if err := positive("timeout", timeout); err != nil {
				return err
			}
			archive, size := cmd.InOrStdin(), int64(0)
			if file != "-" {
				f, err := os.Open(file)
				if err != nil {
					return usagef("%w", err)
				}
				defer f.Close()
				info, err := f.Stat()
				if err != nil || info.IsDir() {
					return usagef("%s is no archive; to copy a folder, see `cloudcode session cp`", file)
				}
				archive, size = f, info.Size()
			} else if interactive(archive) {
				return usagef("there is no archive on stdin; pipe one in, or name a file with -f")
			}
			return withClient(cmd, func(c *client) error {
				shown, clear := transfer(cmd, archive, "importing into "+idOf(name), size)
				defer clear()
				src, err := openTar(shown, file)
				if err != nil {
					return err
				}
				clear()
				if err := c.ensureRunning(cmd, name, timeout); err != nil {
					return err
				}
				resp, err := c.writeArchive(cmd.Context(), name, "", src)
				clear()
				if err != nil {
					return err
				}
				if wait {
					if err := c.ensureRunning(cmd, name, timeout); err != nil {
						return err
					}
				}
				switch out := cmd.OutOrStdout(); outputOf(cmd) {
				case formatJSON:
					return printJSON(out, resp)
				case formatName:
					_, err = fmt.Fprintln(out, name)
				default:
					_, err = fmt.Fprintf(out, "session %s: imported %s, %s\n", idOf(name), plural(resp.GetFiles(), "file", "files"), formatBytes(resp.GetBytes()))
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "-", "read `FILE`; - is stdin")
	f.BoolVarP(&wait, "wait", "w", false, "return when the session is ready with what was imported")
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "how long the session is waited for")
	SetEnvName(f, "file", "")
	_ = cmd.MarkFlagFilename("file", "tar", "gz", "tgz")
	return cmd
}

// ensureRunning makes a session unless there is one, and waits until it runs.
func (c *client) ensureRunning(cmd *cobra.Command, name string, timeout time.Duration) error {
	s, err := c.getSession(cmd.Context(), name)
	if status.Code(err) == codes.NotFound {
		s, err = c.createSession(cmd.Context(), &cloudcodev1.CreateSessionRequest{
			SessionId: idOf(name), Session: &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{}},
		})
		if err == nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "session %s created\n", idOf(name))
		}
	}
	if err != nil || s.GetState() == cloudcodev1.Session_RUNNING {
		return err
	}
	view := waitView(cmd)
	if _, err = c.waitReady(cmd.Context(), s, timeout, view, starting{}); err != nil {
		view.finish(false)
	}
	return err
}

// openTar returns a tar archive, also of one that is compressed with gzip. What is
// none is refused before anything is done.
func openTar(r io.Reader, file string) (io.Reader, error) {
	br := bufio.NewReaderSize(r, archiveChunk)
	if magic, _ := br.Peek(2); string(magic) == "\x1f\x8b" {
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, usagef("%s: %w", file, err)
		}
		br = bufio.NewReaderSize(z, archiveChunk)
	}
	head, err := br.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	_, err = tar.NewReader(bytes.NewReader(head)).Next()
	if len(head) < 512 || errors.Is(err, tar.ErrHeader) {
		return nil, usagef("%s is no tar archive", file)
	}
	return br, nil
}
