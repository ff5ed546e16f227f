from .page import report_page as report_page
from .page import write_page as write_page
from .report_file import read_report as read_report
from .report_file import report_estimates as report_estimates
from .report_file import write_report as write_report
